//! Who may send what: enrolment, revocation, and two ways of proving who one is.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use godwit_tests::{
    Finished, Host, Migrate, Mode, PageServer, PageServerOptions, TwoHosts, Victim, expect_untouched, program,
    wait_for, wait_until,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// Two hosts with configuration directories of their own.
struct Pair {
    hosts: TwoHosts,
}

impl Pair {
    fn new() -> Result<Self> {
        Ok(Self { hosts: TwoHosts::new()? })
    }

    fn config(&self, host: &Host) -> PathBuf {
        self.hosts.directory().join(format!("config-{}", host.name()))
    }

    fn options(&self, host: &Host) -> PageServerOptions {
        PageServerOptions { config_dir: Some(self.config(host)), ..PageServerOptions::default() }
    }

    fn server(&self, host: &Host) -> Result<PageServer> {
        host.page_server_with(&self.hosts.token, &self.options(host))
    }

    /// Runs one of the engine's programs on a host, with that host's configuration.
    fn run(&self, host: &Host, name: &str, arguments: &[&str]) -> Result<Finished> {
        let mut command = host.command(program(name)?);
        command.args(arguments).arg("--config-dir").arg(self.config(host));
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        host.start_command(&mut command)?.finish(Duration::from_secs(20))
    }

    fn invite(&self, server: &PageServer) -> Result<String> {
        let invited = self.run(&self.hosts.destination, "page-server", &["invite", "--address", &server.address])?;
        ensure!(invited.status.success(), "{}", invited.stderr);
        ensure!(invited.stdout.lines().count() == 1, "not one line: {}", invited.stdout);
        Ok(invited.stdout.trim().to_owned())
    }

    fn trust(&self, arguments: &[&str]) -> Result<Finished> {
        self.run(&self.hosts.source, "migrate", &[&["trust"], arguments].concat())
    }

    fn enrol(&self, server: &PageServer, arguments: &[&str]) -> Result<()> {
        let code = self.invite(server)?;
        let trusted = self.trust(&[&[code.as_str()], arguments].concat())?;
        ensure!(trusted.status.success(), "{}", trusted.stderr);
        Ok(())
    }

    fn list(&self, host: &Host) -> Result<Value> {
        let listed = self.run(host, "migrate", &["hosts", "--json"])?;
        serde_json::from_str(&listed.stdout).with_context(|| listed.stderr)
    }

    fn migrate<'a>(&'a self, host: &'a Host, server: &PageServer, victim: &Victim) -> Migrate<'a> {
        let config = self.config(host).display().to_string();
        host.migrate_to(&server.address, victim.pid()).arguments(&["--config-dir", &config])
    }
}

fn text(value: &Value, pointer: &str) -> String {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
}

#[test]
fn a_code_enrols_two_hosts_and_processes_go_both_ways() -> Result<()> {
    let pair = Pair::new()?;
    let (source, destination) = (&pair.hosts.source, &pair.hosts.destination);
    let there = pair.server(destination)?;
    let mut victim = source.victim("memory", &["4", "16", "10"])?;
    // Nobody is trusted yet, and both say what would change that.
    let before = victim.view()?;
    let refused = pair.migrate(source, &there, &victim).run()?;
    refused.expect(1, &["failed"])?;
    expect_untouched(&victim, &before)?;
    let fingerprint = text(&pair.list(destination)?, "/own/fingerprint");
    ensure!(fingerprint.len() == 64, "no fingerprint: {fingerprint}");
    for word in [fingerprint.as_str(), "migrate hosts add"] {
        ensure!(refused.text().contains(word), "the refusal does not say {word}: {}", refused.text());
    }

    let code = pair.invite(&there)?;
    let trusted = pair.trust(&[&code])?;
    ensure!(trusted.status.success() && trusted.stdout.contains(&fingerprint), "{trusted:?}");
    let (ours, theirs) = (pair.list(source)?, pair.list(destination)?);
    ensure!(text(&ours, "/hosts/0/fingerprint") == fingerprint, "{ours:#}");
    ensure!(text(&theirs, "/hosts/0/fingerprint") == text(&ours, "/own/fingerprint"), "{theirs:#}");
    ensure!(text(&theirs, "/hosts/0/name") == "source", "{theirs:#}");
    let again = pair.trust(&[&code])?;
    ensure!(again.status.code() == Some(1) && again.stderr.contains("invit"), "{again:?}");

    for mode in [Mode::Hybrid, Mode::PostCopy] {
        let migration = pair.migrate(source, &there, &victim).mode(mode).run()?;
        migration.expect_moved().with_context(|| there.log())?;
        victim.follow(destination, &migration)?;
        victim.expect_beats(10)?;
        let back = pair.server(source)?;
        let migration = pair.migrate(destination, &back, &victim).run()?;
        migration.expect_moved().with_context(|| back.log())?;
        victim.follow(source, &migration)?;
        victim.expect_beats(10)?;
    }
    ensure!(there.log().contains("from source ("), "the log does not name the source: {}", there.log());
    for log in [there.log(), trusted.stdout, trusted.stderr] {
        ensure!(!log.contains(&code), "the code is shown: {log}");
    }
    victim.finish().map(drop)
}

#[test]
fn revoking_takes_effect_at_once_and_so_does_admitting_by_hand() -> Result<()> {
    let pair = Pair::new()?;
    let (source, destination) = (&pair.hosts.source, &pair.hosts.destination);
    let server = pair.server(destination)?;
    pair.enrol(&server, &[])?;
    let mut victim = source.victim("memory", &["2", "8", "5"])?;
    let before = victim.view()?;
    let gone = pair.run(destination, "migrate", &["hosts", "revoke", "source"])?;
    ensure!(gone.status.success(), "{gone:?}");
    let refused = pair.migrate(source, &server, &victim).run()?;
    refused.expect(1, &["failed"])?;
    expect_untouched(&victim, &before)?;
    // Both ends name the command that admits this host there; it is obeyed to the letter.
    let own = text(&pair.list(source)?, "/own/fingerprint");
    let command = format!("migrate hosts add {own} --name source");
    ensure!(refused.text().contains(&command), "{}", refused.text());
    wait_until("the page server to name the caller", Duration::from_secs(5), || {
        Ok(server.log().contains(&format!("migrate hosts add {own} --name {}", source.address())))
    })
    .with_context(|| server.log())?;
    let words: Vec<&str> = command.split(' ').skip(1).collect();
    let added = pair.run(destination, "migrate", &words)?;
    ensure!(added.status.success(), "{added:?}");
    let migration = pair.migrate(source, &server, &victim).run()?;
    migration.expect_moved().with_context(|| server.log())?;
    victim.follow(destination, &migration)?;
    victim.finish().map(drop)
}

/// A host that is revoked under way is told so when it makes its next link, and not that a port is closed.
#[test]
fn revoking_under_way_is_told() -> Result<()> {
    let pair = Pair::new()?;
    let (source, destination) = (&pair.hosts.source, &pair.hosts.destination);
    let server = pair.server(destination)?;
    pair.enrol(&server, &[])?;
    let victim = source.victim("memory", &["2", "8", "5"])?;
    let before = victim.view()?;
    let migration = pair.migrate(source, &server, &victim).pause_at("round").start()?;
    let agent = wait_for("an agent that stands still", Duration::from_secs(20), || {
        let stands = |pid: u32| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.rsplit_once(')').is_some_and(|(_, rest)| rest.starts_with(" T"))
        };
        Ok(source.processes()?.into_iter().find(|(pid, name)| name == "godwit-agent" && stands(*pid)))
    })?;
    let gone = pair.run(destination, "migrate", &["hosts", "revoke", "source"])?;
    ensure!(gone.status.success(), "{gone:?}");
    kill(Pid::from_raw(agent.0 as i32), Signal::SIGCONT)?;
    migration.process().wake_launcher();
    let begun = Instant::now();
    let migration = migration.finish()?;
    migration.expect(1, &["failed"])?;
    for words in ["does not trust this one", "migrate hosts add"] {
        ensure!(migration.text().contains(words), "{words} is not in {}", migration.text());
    }
    ensure!(begun.elapsed() < Duration::from_secs(5), "told after {:?}", begun.elapsed());
    expect_untouched(&victim, &before)?;
    victim.finish().map(drop)
}

#[test]
fn one_way_is_one_way() -> Result<()> {
    let pair = Pair::new()?;
    let (source, destination) = (&pair.hosts.source, &pair.hosts.destination);
    let there = pair.server(destination)?;
    pair.enrol(&there, &["--one-way"])?;
    let mut victim = source.victim("memory", &["2", "8", "5"])?;
    let migration = pair.migrate(source, &there, &victim).run()?;
    migration.expect_moved().with_context(|| there.log())?;
    victim.follow(destination, &migration)?;
    let back = pair.server(source)?;
    let before = victim.view()?;
    let refused = pair.migrate(destination, &back, &victim).run()?;
    refused.expect(1, &["failed"])?;
    ensure!(refused.text().contains("direction"), "{}", refused.text());
    expect_untouched(&victim, &before)?;
    victim.finish().map(drop)
}

/// The fault daemon and the ports for faults go by the same list.
#[test]
fn a_separate_fault_daemon_trusts_the_same_hosts() -> Result<()> {
    let pair = Pair::new()?;
    let (source, destination) = (&pair.hosts.source, &pair.hosts.destination);
    let socket = pair.hosts.directory().join("lazy.socket");
    let daemon = destination.lazy_pages_of(&pair.config(destination), &socket)?;
    let options = PageServerOptions { lazy_socket: Some(socket), ..pair.options(destination) };
    let server = destination.page_server_with(&pair.hosts.token, &options)?;
    pair.enrol(&server, &[])?;
    let mut victim = source.victim("memory", &["4", "32", "10"])?;
    let migration = pair.migrate(source, &server, &victim).mode(Mode::PostCopy).run()?;
    let story = || format!("{}; page server: {}; daemon: {}", migration.text(), server.log(), daemon.log());
    migration.expect_moved().with_context(story)?;
    ensure!(migration.number("/faults/count")? > 0.0, "no fault was served: {}", story());
    victim.follow(destination, &migration)?;
    victim.expect_beats(20)?;
    victim.finish().map(drop)
}

#[test]
fn tokens_and_host_keys_do_not_mix_and_say_so() -> Result<()> {
    let pair = Pair::new()?;
    let (source, destination) = (&pair.hosts.source, &pair.hosts.destination);
    let victim = source.victim("memory", &["1", "4", "0"])?;
    let before = victim.view()?;
    let by_token = destination.page_server(&pair.hosts.token)?;
    let by_keys = pair.server(destination)?;
    for migration in [
        pair.migrate(source, &by_token, &victim).run()?,
        source.migrate_to(&by_keys.address, victim.pid()).token(pair.hosts.token.path()).run()?,
    ] {
        migration.expect(1, &["failed"])?;
        ensure!(migration.text().contains("--token-file"), "{}", migration.text());
        expect_untouched(&victim, &before)?;
    }
    victim.finish().map(drop)
}

/// Everything below a directory, with its mode.
fn modes(directory: &Path) -> Result<Vec<(PathBuf, bool, u32)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        let metadata = std::fs::symlink_metadata(&path)?;
        found.push((path.clone(), metadata.is_dir(), metadata.mode() & 0o7777));
        if metadata.is_dir() {
            found.extend(modes(&path)?);
        }
    }
    Ok(found)
}

/// The lines of a host's private key, and what they stand for in other digits.
fn key_material(config: &Path) -> Result<Vec<String>> {
    let pem = std::fs::read_to_string(config.join("host.pem"))?;
    let body = pem.split("-----BEGIN PRIVATE KEY-----").nth(1).context("no private key")?;
    let body = body.split("-----END").next().context("no end of a private key")?;
    let lines: Vec<String> = body.lines().map(str::trim).filter(|line| line.len() > 8).map(str::to_owned).collect();
    ensure!(!lines.is_empty(), "an empty key");
    Ok(lines)
}

/// Keys and tokens lie where nobody else can read them, and show up nowhere else: not in logs, however much they say, not in events, not in
/// arguments or environments.
#[test]
fn keys_and_tokens_stay_where_they_are() -> Result<()> {
    let pair = Pair::new()?;
    let (source, destination) = (&pair.hosts.source, &pair.hosts.destination);
    let talkative = |options: PageServerOptions| PageServerOptions { arguments: vec!["-vvv".to_owned()], ..options };
    let by_keys = destination.page_server_with(&pair.hosts.token, &talkative(pair.options(destination)))?;
    let by_token = destination.page_server_with(&pair.hosts.token, &talkative(PageServerOptions::default()))?;
    pair.enrol(&by_keys, &[])?;
    let token = std::fs::read(pair.hosts.token.path())?;
    let mut secrets = vec![token.iter().map(|byte| format!("{byte:02x}")).collect::<String>()];
    secrets.push(format!("{token:?}").trim_matches(['[', ']']).to_owned());
    for host in [source, destination] {
        let config = pair.config(host);
        secrets.extend(key_material(&config)?);
        for (path, is_directory, mode) in modes(&config)? {
            let wanted = if is_directory { 0o700 } else { 0o600 };
            ensure!(mode == wanted, "{} has mode {mode:o}", path.display());
        }
    }
    let mut said = String::new();
    for (server, by_token) in [(&by_keys, false), (&by_token, true)] {
        let mut victim = source.victim("memory", &["2", "16", "5"])?;
        let migrate =
            if by_token { source.migrate(server, victim.pid()) } else { pair.migrate(source, server, &victim) };
        let mut running = migrate.mode(Mode::PostCopy).arguments(&["-vvv"]).start()?;
        running.wait_for_phase("prepare")?;
        for (pid, _) in [source.processes()?, destination.processes()?].concat() {
            for file in ["cmdline", "environ"] {
                // N.B. some have ended meanwhile.
                let bytes = std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
                said += &String::from_utf8_lossy(&bytes);
            }
        }
        let migration = running.finish()?;
        migration.expect_moved().with_context(|| server.log())?;
        victim.follow(destination, &migration)?;
        said += &migration.text();
        said += &server.log();
        victim.finish()?;
    }
    ensure!(said.contains("TRACE"), "not everything was said that can be");
    for secret in secrets {
        ensure!(!said.contains(&secret), "a secret is shown");
    }
    Ok(())
}

/// What the quick start of a script does: a token in the usual place of both hosts, and nothing else said.
#[test]
fn a_token_in_the_usual_place_counts_until_a_host_is_trusted() -> Result<()> {
    let pair = Pair::new()?;
    let (source, destination) = (&pair.hosts.source, &pair.hosts.destination);
    for host in [source, destination] {
        let (directory, token) = (pair.config(host), pair.hosts.token.path());
        std::fs::create_dir(&directory)?;
        std::fs::copy(token, directory.join("token"))?;
    }
    let server = pair.server(destination)?;
    let mut victim = source.victim("memory", &["2", "8", "5"])?;
    let migration = pair.migrate(source, &server, &victim).mode(Mode::PostCopy).run()?;
    migration.expect_moved().with_context(|| server.log())?;
    victim.follow(destination, &migration)?;
    pair.enrol(&server, &[])?;
    let mut next = source.victim("memory", &["2", "8", "5"])?;
    let refused = source.migrate_to(&server.address, next.pid()).token(pair.hosts.token.path()).run()?;
    refused.expect(1, &["failed"])?;
    let migration = pair.migrate(source, &server, &next).mode(Mode::PostCopy).run()?;
    migration.expect_moved().with_context(|| server.log())?;
    next.follow(destination, &migration)?;
    next.finish()?;
    victim.finish().map(drop)
}

#[test]
fn a_code_with_a_typing_error_is_refused_before_anybody_is_called() -> Result<()> {
    let pair = Pair::new()?;
    let server = pair.server(&pair.hosts.destination)?;
    let code = pair.invite(&server)?;
    let wrong = code.replacen(&code[20..21], if &code[20..21] == "a" { "b" } else { "a" }, 1);
    let refused = pair.trust(&[&wrong])?;
    ensure!(refused.status.code() == Some(1) && refused.stderr.contains("typing error"), "{refused:?}");
    ensure!(!refused.stderr.contains(&wrong), "the code is shown: {refused:?}");
    // From standard input it never stands in a process's arguments.
    let mut command = pair.hosts.source.command("sh");
    command.args(["-c", "echo \"$1\" | \"$2\" trust - --config-dir \"$3\"", "sh", &code]);
    command.arg(program("migrate")?).arg(pair.config(&pair.hosts.source));
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let trusted = pair.hosts.source.start_command(&mut command)?.finish(Duration::from_secs(20))?;
    ensure!(trusted.status.success(), "{trusted:?}");
    Ok(())
}

#[test]
fn an_invitation_expires() -> Result<()> {
    let pair = Pair::new()?;
    let server = pair.server(&pair.hosts.destination)?;
    let arguments = ["invite", "--valid", "1s", "--address", &server.address];
    let code = pair.run(&pair.hosts.destination, "page-server", &arguments)?.stdout;
    std::thread::sleep(Duration::from_secs(2));
    let refused = pair.trust(&[code.trim()])?;
    ensure!(refused.status.code() == Some(1) && refused.stderr.contains("expired"), "{refused:?}");
    ensure!(pair.list(&pair.hosts.destination)?["hosts"] == Value::Array(Vec::new()));
    Ok(())
}
