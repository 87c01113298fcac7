//! Hosts whose packet filter goes by what it has seen of a connection, as ordinary ones do.

use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use godwit_tests::clients::converse;
use godwit_tests::{Host, Mode, TwoHosts};

const ADDRESS: &str = "10.77.0.100";
const PORT: u16 = 6200;
/// Longest time that an answer takes.
const PATIENCE: Duration = Duration::from_secs(3);

/// Only what belongs to known connections comes in, new ones to the server, and moves; what makes no sense goes neither in nor out.
fn stand_guard(host: &Host) -> Result<()> {
    let rules = format!(
        "table inet guard {{
            counter senseless {{ }}
            chain in {{
                type filter hook input priority filter; policy drop;
                ct state invalid counter name senseless drop
                ct state established,related accept
                iif lo accept
                meta l4proto icmp accept
                tcp dport {PORT} ct state new accept
                udp dport 7477-7489 accept
            }}
            chain out {{
                type filter hook output priority filter;
                ct state invalid counter name senseless drop
            }}
        }}"
    );
    host.run("nft", &[&rules]).map(drop)
}

fn there_and_back(mode: Mode) -> Result<()> {
    let hosts = TwoHosts::builder().with_clients().build()?;
    for host in [&hosts.source, &hosts.destination] {
        stand_guard(host)?;
    }
    hosts.source.run("ip", &["address", "add", &format!("{ADDRESS}/32"), "dev", "godwit0"])?;
    let mut victim = hosts.source.victim("connections", &[ADDRESS, "reuse=1"])?;
    let address = SocketAddr::new(ADDRESS.parse()?, PORT);
    let stop = Arc::new(AtomicBool::new(false));
    let mut clients = Vec::new();
    for _ in 0..8 {
        let mut stream = hosts.clients()?.connect_to(address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"e")?;
        let stop = Arc::clone(&stop);
        clients.push(std::thread::spawn(move || converse(stream, &stop)));
    }
    let servers = [hosts.destination.page_server(&hosts.token)?, hosts.source.page_server(&hosts.token)?];
    let mut stories = String::new();
    for (server, there) in servers.iter().zip([true, false]) {
        std::thread::sleep(Duration::from_millis(300));
        let (from, to) = if there { (&hosts.source, &hosts.destination) } else { (&hosts.destination, &hosts.source) };
        let migration = from.migrate(server, victim.pid()).mode(mode).arguments(&["--move-addr", ADDRESS]).run()?;
        migration.expect_moved().with_context(|| server.log())?;
        victim.follow(to, &migration)?;
        stories += &migration.text();
    }
    std::thread::sleep(Duration::from_millis(300));
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        let done = client.join().map_err(|_| anyhow!("a client panicked"))?.with_context(|| stories.clone())?;
        ensure!(done > 0, "a client got nothing done");
    }
    victim.finish().map(drop)
}

#[test]
fn of_a_host_that_it_comes_back_to_hybrid() -> Result<()> {
    there_and_back(Mode::Hybrid)
}

#[test]
fn of_a_host_that_it_comes_back_to_stop_and_copy() -> Result<()> {
    there_and_back(Mode::StopAndCopy)
}
