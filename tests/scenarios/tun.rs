//! Interfaces whose other end is a file (tun(4)), and these files: in a network namespace of the process's own, and on the host.

use anyhow::{Context, Result, ensure};
use godwit_tests::{Host, Mode, TwoHosts, Victim, expect_untouched};

/// What the namespace has before the victim attaches itself.
const FURNISH: &str = "
    ip link set lo up
    ip tuntap add dev tun0 mode tun
    ip tuntap add dev tap0 mode tap vnet_hdr user 1234 group 4321
    ip tuntap add dev mq0 mode tun multi_queue pi
    ip tuntap add dev spare0 mode tap
    ip link set tap0 address 02:00:00:00:08:01 mtu 1400
    for dev in tun0 tap0 mq0 spare0; do echo 1 > /proc/sys/net/ipv6/conf/$dev/disable_ipv6; done
    for dev in tun0 tap0 mq0; do ip link set $dev up; done
    ip addr add 10.9.0.1/24 dev tun0
    ip addr add 10.8.0.1/24 dev tap0
    ip neigh add 10.8.0.2 lladdr 02:00:00:00:08:02 dev tap0 nud permanent
    ip route add 10.66.0.0/16 via 10.9.0.2
";
/// As the victim's tun0 has it, for a host.
const PREPARE: &str = "
    ip tuntap add dev tun0 mode tun
    echo 1 > /proc/sys/net/ipv6/conf/tun0/disable_ipv6
    ip link set tun0 up
    ip addr add 10.9.0.1/24 dev tun0
";

/// What `ip` says of the interfaces in the namespace of a victim.
fn describe(victim: &Victim) -> Result<String> {
    let script = "ip -d -o link show type tun | sed 's/numqueues/\\nnumqueues/; s/ promiscuity.*tun type/ tun type/; s/addrgenmode [a-z0-9_]*//'; \
                  ip -br addr; ip route; ip neigh show nud permanent";
    let pid = victim.host_pid().to_string();
    let output = std::process::Command::new("nsenter").args(["-t", &pid, "-n", "sh", "-c", script]).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(text.contains("10.66.0.0/16 via 10.9.0.2"), "{text}{output:?}");
    Ok(text)
}

fn in_own_network(mode: Mode) -> Result<()> {
    let hosts = TwoHosts::new()?;
    let mut victim = hosts.source.victim_in_own_network(FURNISH, "tun", &[])?;
    victim.expect_beats(20)?;
    let expected = describe(&victim)?;
    for word in ["tun type tun", "tun type tap", "multi_queue", "user 1234", "group 4321", "numqueues 2"] {
        ensure!(expected.contains(word), "no {word} in {expected}");
    }
    let servers = [hosts.destination.page_server(&hosts.token)?, hosts.source.page_server(&hosts.token)?];
    for (number, server) in servers.iter().enumerate() {
        let (from, to): (&Host, &Host) =
            if number == 0 { (&hosts.source, &hosts.destination) } else { (&hosts.destination, &hosts.source) };
        let migration = from.migrate(server, victim.pid()).mode(mode).run()?;
        let story = || format!("{}; page server: {}; victim: {}", migration.text(), server.log(), victim.log());
        migration.expect_moved().with_context(story)?;
        victim.follow(to, &migration)?;
        victim.expect_beats(30).with_context(|| victim.log())?;
        let found = describe(&victim)?;
        ensure!(expected == found, "the interfaces were\n{expected}\nand are\n{found}");
    }
    victim.finish().map(drop)
}

#[test]
fn in_own_network_hybrid() -> Result<()> {
    in_own_network(Mode::Hybrid)
}

#[test]
fn in_own_network_pre_copy() -> Result<()> {
    in_own_network(Mode::PreCopy)
}

#[test]
fn in_own_network_post_copy() -> Result<()> {
    in_own_network(Mode::PostCopy)
}

#[test]
fn in_own_network_stop_and_copy() -> Result<()> {
    in_own_network(Mode::StopAndCopy)
}

/// A move that fails inside the freeze leaves interfaces and files as they were, and the next one works.
#[test]
fn called_off() -> Result<()> {
    let hosts = TwoHosts::builder().rate("200mbit").build()?;
    let mut victim = hosts.source.victim_in_own_network(FURNISH, "tun", &[])?;
    victim.expect_beats(10)?;
    let (before, network) = (victim.view()?, describe(&victim)?);
    let server = hosts.destination.page_server(&hosts.token)?;
    let mut migration = hosts.source.migrate(&server, victim.pid()).mode(Mode::StopAndCopy).start()?;
    migration.wait_for_event("the freeze", |event| event.get("event").is_some_and(|name| name == "frozen"))?;
    migration.interrupt()?;
    let migration = migration.finish()?;
    migration.expect(1, &["cancelled"])?;
    expect_untouched(&victim, &before)?;
    ensure!(describe(&victim)? == network);
    victim.expect_beats(10)?;
    let migration = hosts.source.migrate(&server, victim.pid()).run()?;
    migration.expect_moved().with_context(|| server.log())?;
    victim.follow(&hosts.destination, &migration)?;
    victim.expect_beats(20)?;
    victim.finish().map(drop)
}

/// On a host the interface is the administrator's: without one of the same name and kind the move is refused, with the way out.
#[test]
fn of_the_host() -> Result<()> {
    let hosts = TwoHosts::new()?;
    hosts.source.run("sh", &["-e", "-c", PREPARE])?;
    let mut victim = hosts.source.victim("tun", &["alone"])?;
    victim.expect_beats(10)?;
    let before = victim.view()?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let refused = |words: &[&str]| -> Result<()> {
        let migration = hosts.source.migrate(&server, victim.pid()).run()?;
        migration.expect(1, &["refused"])?;
        for word in words {
            ensure!(migration.text().contains(word), "the refusal does not say {word}: {}", migration.text());
        }
        expect_untouched(&victim, &before)
    };
    refused(&["tun interface tun0", "no interface of this name", "ip tuntap add dev tun0 mode tun"])?;
    hosts.destination.run("ip", &["tuntap", "add", "dev", "tun0", "mode", "tap"])?;
    refused(&["tun interface tun0", "another kind"])?;
    hosts.destination.run("ip", &["tuntap", "del", "dev", "tun0", "mode", "tap"])?;
    hosts.destination.run("sh", &["-e", "-c", PREPARE])?;
    let migration = hosts.source.migrate(&server, victim.pid()).run()?;
    migration.expect_moved().with_context(|| server.log())?;
    victim.follow(&hosts.destination, &migration)?;
    victim.expect_beats(30).with_context(|| victim.log())?;
    victim.finish().map(drop)
}

/// A filter cannot be read, and another program's file cannot come along.
#[test]
fn what_cannot_go_along() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let victim = hosts.source.victim("refused", &["tap"])?;
    let before = victim.view()?;
    let migration = hosts.source.migrate(&server, victim.pid()).run()?;
    migration.expect(1, &["refused"])?;
    ensure!(migration.text().contains("TUNATTACHFILTER"), "the refusal does not name the filter: {}", migration.text());
    expect_untouched(&victim, &before)?;
    victim.finish()?;
    // Somebody outside of the namespace has the other end of an interface in it.
    let furnish = format!(
        "{FURNISH}\nip link set spare0 up\n( ( exec 9<>/dev/net/tun; python3 -c 'import fcntl, struct; fcntl.ioctl(9, 0x400454ca, struct.pack(\"16sH22x\", b\"spare0\", 0x1002))'; \
         exec nsenter -t 1 -n sleep 60 0<&- >/dev/null 2>&1 ) & )\nsleep 0.5"
    );
    let victim = hosts.source.victim_in_own_network(&furnish, "tun", &[])?;
    let before = victim.view()?;
    let migration = hosts.source.migrate(&server, victim.pid()).run()?;
    migration.expect(1, &["refused"])?;
    let words = ["interface spare0", "another program has the file"];
    ensure!(words.iter().all(|word| migration.text().contains(word)), "{}", migration.text());
    expect_untouched(&victim, &before)?;
    victim.finish().map(drop)
}
