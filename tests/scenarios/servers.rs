//! Servers that nobody wrote for this, with clients on a third host that check every answer: they move with their address, there
//! and back, and no client sees anything but a delay. Some of it over a path that takes 50 ms and loses one packet in a hundred.
//!
//! `GODWIT_SERVERS=long` has each of them make ten moves.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::{Mode, Path, TwoHosts, wait_until};

#[path = "servers/http.rs"]
mod http;
#[path = "servers/redis.rs"]
mod redis;
#[path = "servers/service.rs"]
mod service;

use service::{ADDRESS, Service, hosts};

/// 50 ms each way, and every hundredth packet lost.
const FAR: Path =
    Path { delay: Duration::from_millis(50), lost_permille: 10, late_permille: 0, bytes_per_second: None, seed: 1 };
const NEAR: Path = Path { delay: Duration::ZERO, lost_permille: 0, late_permille: 0, bytes_per_second: None, seed: 0 };

/// Bytes of a value of Redis: with a thousand connections it holds 50 MB.
const VALUE: usize = 5000;

const HERE: &str = env!("CARGO_MANIFEST_DIR");

/// Modes to go there and back in.
fn modes() -> Vec<Mode> {
    let modes = [Mode::Hybrid, Mode::PostCopy];
    if std::env::var("GODWIT_SERVERS").is_ok_and(|word| word == "long") {
        return modes.into_iter().cycle().take(5).collect();
    }
    modes.to_vec()
}

fn start_redis(hosts: TwoHosts) -> Result<Service> {
    let directory = hosts.directory().display().to_string();
    let words = ["--port", "6379", "--bind", ADDRESS, "--dir", &directory, "--save", "", "--appendonly", "no"];
    let more = ["--protected-mode", "no", "--maxclients", "5000", "--tcp-backlog", "1024"];
    Service::start(hosts, "redis-server", &[&words[..], &more].concat(), 6379)
}

/// Clients in threads of so many connections each, with values of `size` bytes; each connection has ten keys.
fn employ_redis_clients(service: &mut Service, threads: u64, each: u64, size: usize) -> Result<()> {
    for thread in 0..threads {
        let numbers = thread * each..(thread + 1) * each;
        service.employ(format!("with connections {numbers:?}"), move |duty| redis::work(duty, numbers, size))?;
    }
    Ok(())
}

#[test]
fn redis_with_a_thousand_connections() -> Result<()> {
    let mut service = start_redis(hosts(NEAR)?)?;
    employ_redis_clients(&mut service, 4, 250, VALUE)?;
    service.there_and_back(&modes(), 20)?;
    service.finish()
}

/// 200 MB, all of which are rewritten again and again.
#[test]
fn redis_with_two_hundred_megabytes() -> Result<()> {
    let mut service = start_redis(hosts(NEAR)?)?;
    employ_redis_clients(&mut service, 4, 250, 4 * VALUE)?;
    service.there_and_back(&modes(), 20)?;
    service.finish()
}

#[test]
fn redis_ten_moves_in_a_row() -> Result<()> {
    let mut service = start_redis(hosts(NEAR)?)?;
    employ_redis_clients(&mut service, 2, 50, VALUE)?;
    service.there_and_back(&[Mode::Hybrid, Mode::PostCopy, Mode::PreCopy, Mode::StopAndCopy, Mode::Hybrid], 5)?;
    service.finish()
}

#[test]
fn redis_far_away() -> Result<()> {
    let mut service = start_redis(hosts(FAR)?)?;
    employ_redis_clients(&mut service, 4, 10, VALUE)?;
    service.there_and_back(&modes(), 3)?;
    service.finish()
}

/// It closes each connection when the kernel has taken its answer, and has no descriptor of it while a slow client reads.
fn server_that_closes(path: Path) -> Result<()> {
    let hosts = hosts(path)?;
    let place = hosts.directory().join("files");
    std::fs::create_dir(&place)?;
    let (large, small) = (content(1 << 20), content(10_000));
    std::fs::write(place.join("large"), &*large)?;
    std::fs::write(place.join("small"), &*small)?;
    let directory = place.display().to_string();
    // Its queue of five is too short for clients who come all at once.
    let program = format!(
        "import http.server as h, functools as f\n\
         h.ThreadingHTTPServer.request_queue_size = 128\n\
         handler = f.partial(h.SimpleHTTPRequestHandler, directory={directory:?})\n\
         h.ThreadingHTTPServer(({ADDRESS:?}, 8000), handler).serve_forever()\n"
    );
    let mut service = Service::start(hosts, "python3", &["-c", &program], 8000)?;
    for client in 0..8u64 {
        let (content, rate) = (Arc::clone(&large), 100_000 * (1 + client % 4));
        service
            .employ(format!("at {rate} B/s"), move |duty| http::download_and_part(duty, "/large", &content, rate))?;
    }
    // Where packets are lost a request may be left half finished by a move, and its client has to call again.
    let in_a_hurry = if path.lost_permille == 0 { 2 } else { 0 };
    for _ in 0..in_a_hurry {
        let content = Arc::clone(&small);
        service.employ("in a hurry", move |duty| http::download_and_part(duty, "/small", &content, u64::MAX))?;
    }
    service.there_and_back(&modes(), 10)?;
    service.finish()
}

#[test]
fn python_closes_each_connection() -> Result<()> {
    server_that_closes(NEAR)
}

/// Every so often the path loses so much at once that a connection cannot be taken over.
#[test]
#[ignore = "a client may be lost, which is told"]
fn python_closes_each_connection_far_away() -> Result<()> {
    server_that_closes(FAR)
}

/// One process, files sent by sendfile(2).
fn start_nginx(hosts: TwoHosts, content: &[u8]) -> Result<Service> {
    let directory = hosts.directory().join("nginx");
    std::fs::create_dir(&directory)?;
    std::fs::write(directory.join("file"), content)?;
    let place = directory.display().to_string();
    let configuration = format!(
        "master_process off; daemon off; pid {place}/pid; error_log {place}/error;
         events {{ worker_connections 512; }}
         http {{
             access_log off; sendfile on; tcp_nopush on; keepalive_requests 100000;
             client_body_temp_path {place}/body; proxy_temp_path {place}/proxy; fastcgi_temp_path {place}/fastcgi;
             uwsgi_temp_path {place}/uwsgi; scgi_temp_path {place}/scgi;
             server {{ listen {ADDRESS}:80; root {place}; default_type application/octet-stream; }}
         }}"
    );
    std::fs::write(directory.join("configuration"), configuration)?;
    let file = format!("{place}/configuration");
    Service::start(hosts, "nginx", &["-p", &place, "-c", &file, "-e", &format!("{place}/error")], 80)
}

/// Bytes that tell their place.
fn content(length: usize) -> Arc<Vec<u8>> {
    let mut bytes = Vec::with_capacity(length + 8);
    let mut state = 88_172_645_463_325_252_u64;
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    Arc::new(bytes)
}

fn nginx(path: Path, clients: usize, rate: u64, pieces: u64) -> Result<()> {
    let content = content(12 << 20);
    let mut service = start_nginx(hosts(path)?, &content)?;
    for client in 0..clients {
        let (content, rate) = (Arc::clone(&content), rate * (1 + client as u64 % 4));
        service.employ(format!("at {rate} B/s"), move |duty| http::download(duty, "/file", &content, rate))?;
    }
    service.there_and_back(&modes(), pieces)?;
    service.finish()
}

#[test]
fn nginx_sends_a_large_file_slowly() -> Result<()> {
    nginx(NEAR, 20, 1_000_000, 10)
}

#[test]
fn nginx_far_away() -> Result<()> {
    nginx(FAR, 6, 400_000, 2)
}

/// Kept connections and WebSockets. An IPv6 socket takes clients of IPv4 as well; `address` is the one that it listens at.
fn node(path: Path, address: &str, clients: usize, answers: u64) -> Result<()> {
    let script = format!("{HERE}/scenarios/programs/node_server.js");
    let mut service = Service::start(hosts(path)?, "node", &[&script, address, "8080"], 8080)?;
    for number in 0..clients {
        service.employ(format!("sums {number}"), http::ask_for_sums)?;
        service.employ(format!("talk {number}"), http::listen_and_talk)?;
    }
    service.there_and_back(&modes(), answers)?;
    service.finish()
}

#[test]
fn node_at_any_address() -> Result<()> {
    node(NEAR, "::", 10, 20)
}

#[test]
fn node_at_an_ipv4_address_in_the_guise_of_ipv6() -> Result<()> {
    node(NEAR, &format!("::ffff:{ADDRESS}"), 4, 10)
}

#[test]
fn node_far_away() -> Result<()> {
    node(FAR, ADDRESS, 5, 5)
}

/// The interpreter itself: a wrapper on the search path would start it as its child.
fn python() -> Result<String> {
    let output = std::process::Command::new("python3").args(["-c", "import sys; print(sys.executable)"]).output();
    let output = output.context("python3 is needed")?;
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

fn tls(path: Path, clients: usize, rounds: usize) -> Result<()> {
    let hosts = hosts(path)?;
    let [certificate, key] = ["certificate", "key"].map(|name| hosts.directory().join(name).display().to_string());
    let words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=godwit -addext subjectAltName=DNS:godwit";
    let words: Vec<&str> = words.split(' ').chain(["-keyout", &key, "-out", &certificate]).collect();
    let made = std::process::Command::new("openssl").args(words).output().context("openssl is needed")?;
    ensure!(made.status.success(), "no certificate: {}", String::from_utf8_lossy(&made.stderr));
    let script = |name: &str| format!("{HERE}/scenarios/programs/{name}.py");
    let mut service =
        Service::start(hosts, &python()?, &[&script("tls_server"), ADDRESS, "4433", &certificate, &key], 4433)?;
    let words = [&script("tls_clients"), &clients.to_string(), ADDRESS, "4433", &certificate];
    let victim = service.hosts.clients()?.program_victim("tls", &python()?, &words)?;
    // Twenty lines to an answer, and as many answers as there are clients.
    let answers = || -> Result<()> {
        let enough = victim.status()?.checks + (20 * clients * rounds) as u64;
        wait_until("answers to all clients", Duration::from_secs(40), || Ok(victim.expect_beats(1)?.checks >= enough))
    };
    answers()?;
    for mode in modes() {
        for _ in 0..2 {
            let migration = service.travel(mode)?;
            answers().with_context(|| migration.text())?;
        }
    }
    victim.finish().map(drop)
}

#[test]
fn python_with_tls() -> Result<()> {
    tls(NEAR, 30, 5)
}

#[test]
fn python_with_tls_far_away() -> Result<()> {
    tls(FAR, 10, 2)
}
