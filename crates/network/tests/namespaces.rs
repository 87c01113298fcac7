//! A network namespace read and made again elsewhere. Needs root.

use std::io::ErrorKind;
use std::net::{IpAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use godwit_network::{Flow, Namespace, Silence, contents};
use godwit_proto::wire::network_joint::Kind;
use godwit_proto::wire::{NetworkJoint, NetworkNamespace};
use nix::sched::{CloneFlags, unshare};

fn own_network() {
    assert!(nix::unistd::geteuid().is_root(), "network namespaces need root: run the tests as root");
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    run("ip link set lo up; ip link add br0 type bridge; ip addr add 10.9.0.254/24 dev br0; ip link set br0 up");
}

fn run(script: &str) -> String {
    let output = Command::new("sh").args(["-e", "-c", script]).output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script}: {words}");
    String::from_utf8(output.stdout).unwrap()
}

fn joint(kind: Kind, name: &str) -> NetworkJoint {
    NetworkJoint { kind: kind.into(), name: name.into(), interface: String::new() }
}

/// Makes a namespace that is joined to the bridge of this one.
fn joined(index: u32) -> Namespace {
    let namespace = Namespace::create().unwrap();
    let holder = namespace.inside(|| Command::new("sleep").arg("60").spawn().unwrap()).unwrap();
    let (pid, mut holder) = (holder.id(), holder);
    run(&format!(
        "ip link add port{index} type veth peer name eth0 index {index} netns {pid}; ip link set port{index} master br0 up"
    ));
    holder.kill().unwrap();
    holder.wait().unwrap();
    namespace
}

const FURNISH: &str = "
    ip link set lo up
    ip link set eth0 address 02:00:00:00:00:77 mtu 1400 up
    ip addr add 10.9.0.1/24 dev eth0
    ip addr add fd09::1/64 dev eth0 nodad
    ip link add br1 type bridge
    ip link add a0 type veth peer name a1
    ip link set a0 master br1 up; ip link set a1 up; ip link set br1 up
    ip addr add 10.8.0.1/24 dev a1
    ip route add default via 10.9.0.254
    ip route add 10.7.0.0/16 via 10.9.0.253 metric 50
    ip route add 10.6.0.0/16 table 77 dev eth0
    ip route add 10.5.0.0/16 nexthop via 10.9.0.250 nexthop via 10.9.0.251 weight 3
    ip -6 route add fd10::/64 via fd09::fe
    ip rule add from 10.9.0.1 table 77 priority 100
    ip -6 rule add fwmark 5 table 78
    ip neigh add 10.9.0.200 lladdr 02:00:00:00:00:99 dev eth0 nud permanent
    echo 1 > /proc/sys/net/ipv4/ip_forward
    echo 33 > /proc/sys/net/ipv4/ip_default_ttl
    echo 77 > /proc/sys/net/core/somaxconn
    echo 2 > /proc/sys/net/ipv4/conf/eth0/rp_filter
    echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
";

const RULES: &str = "
table inet filter {
    counter seen { packets 3 bytes 180; }
    set friends { type ipv4_addr; flags interval; elements = { 10.9.0.0/24, 192.0.2.1 }; }
    map ports { type inet_service : verdict; elements = { 80 : accept, 81 : jump others }; }
    set late { type ipv4_addr; size 128; flags dynamic,timeout; timeout 1h; }
    chain others { counter name seen ip saddr { 10.0.0.1, 10.0.0.2 } drop; }
    chain in {
        type filter hook input priority filter; policy accept;
        ct state established,related accept
        ip saddr @friends accept
        tcp dport vmap @ports
        tcp dport { 22, 443 } limit rate 5/second counter packets 7 bytes 8 comment \"kept\"
        udp dport 53 update @late { ip saddr };
    }
}
table ip nat {
    chain out {
        type nat hook postrouting priority srcnat; policy accept;
        oifname \"eth0\" ip saddr 10.8.0.0/24 masquerade;
    }
    chain in {
        type nat hook prerouting priority dstnat; policy accept;
        tcp dport 8080 dnat to 10.9.0.1:80;
    }
}
table arp quiet {
    chain in { type filter hook input priority 0; policy accept; }
}
";

fn facts(namespace: &Namespace) -> String {
    namespace
        .inside(|| {
            run("ip -d -br addr | sed 's/@[^ ]*//' | tr -s ' ' | sort; ip -d link show eth0 | grep -o 'mtu [0-9]*'; ip rule; ip -6 rule; \
                 ip route show table all | sort | sed 's/ linkdown//; s/ dead//'; ip -6 route show table all | sort; ip neigh show nud permanent; \
                 nft list ruleset; \
                 cd /proc/sys/net; head -n 1 ipv4/ip_forward ipv4/ip_default_ttl core/somaxconn ipv4/conf/eth0/rp_filter ipv6/conf/all/forwarding; \
                 ip -br link show eth0 | grep -o '02:[0-9a-f:]*'")
        })
        .unwrap()
}

fn furnish(namespace: &Namespace) {
    namespace.inside(|| run(&format!("{FURNISH}\nnft -f - <<'END'\n{RULES}\nEND\n"))).unwrap();
}

/// Waits until every interface has come up: a bridge does some time after its ports.
fn settle(namespace: &Namespace) {
    let states = || namespace.inside(|| run("ip -br link; ip -br addr show tentative")).unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    while Instant::now() < deadline && (states().contains(" DOWN ") || states().contains("fe80")) {
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn make(contents: &NetworkNamespace, joints: &[NetworkJoint], prefix: &str) -> contents::Furnished {
    contents::Furnished::make(Namespace::create().unwrap(), contents, joints, prefix).unwrap()
}

#[test]
fn what_is_in_a_namespace_is_made_again() {
    own_network();
    let here = joined(7);
    furnish(&here);
    let joints = [joint(Kind::Veth, "br0")];
    settle(&here);
    let was = contents::read(&here).unwrap();
    assert_eq!(contents::objections(std::process::id() as i32, &was, &joints, &[]), []);
    assert_eq!(contents::missing_here(&was, &joints), []);
    assert!(contents::addresses(&was).contains(&IpAddr::from([10, 9, 0, 1])));
    let expected = facts(&here);
    contents::take_down(&here).unwrap();
    let mut there = make(&was, &joints, "gw7x");
    settle(there.namespace());
    pretty_assert(&expected, &facts(there.namespace()));
    // Once more from there, and what changes meanwhile is followed.
    there
        .namespace()
        .inside(|| {
            run("ip route del 10.7.0.0/16; ip route add 10.4.0.0/16 via 10.9.0.252; ip addr add 10.9.0.5/24 dev eth0; \
             ip rule del priority 100; nft add rule inet filter others accept")
        })
        .unwrap();
    let changed = contents::read(there.namespace()).unwrap();
    let mut third = make(&was, &[joint(Kind::Macvlan, "br0")], "gw8x");
    assert!(!contents::links_differ(&was, &was));
    third.follow(&changed).unwrap();
    settle(third.namespace());
    // A macvlan does not know whether it is up.
    let third = facts(third.namespace()).replace("eth0 UNKNOWN", "eth0 UP");
    pretty_assert(&facts(there.namespace()), &third);
    there.follow(&changed).unwrap();
}

fn pretty_assert(expected: &str, found: &str) {
    for (line, (one, other)) in expected.lines().zip(found.lines()).enumerate() {
        assert_eq!(one, other, "line {line} of\n{expected}\n--- and\n{found}");
    }
    assert_eq!(expected.lines().count(), found.lines().count(), "{expected}\n--- and\n{found}");
}

#[test]
fn tracked_connections_go_on() {
    own_network();
    let (here, there) = (joined(7), Namespace::create().unwrap());
    furnish(&here);
    here.inside(|| run("nft 'add rule inet filter in ct state invalid drop'")).unwrap();
    let listener = TcpListener::bind("10.9.0.254:4000").unwrap();
    let _stream = here.inside(|| TcpStream::connect("10.9.0.254:4000").unwrap()).unwrap();
    let _accepted = listener.accept().unwrap();
    // One that is translated: who calls port 8080 speaks with port 80.
    let web = here.inside(|| TcpListener::bind("10.9.0.1:80").unwrap()).unwrap();
    let _caller = TcpStream::connect("10.9.0.1:8080").unwrap();
    let _called = web.accept().unwrap();
    let mut was = contents::read(&here).unwrap();
    let reader = contents::Reader::new(&here).unwrap();
    was.tracked = reader.tracked().unwrap();
    assert!(was.tracked.len() >= 2);
    // One that came up since.
    let _late = here.inside(|| TcpStream::connect("10.9.0.254:4000").unwrap()).unwrap();
    let (accepted, _) = listener.accept().unwrap();
    let flow = Flow::new(accepted.peer_addr().unwrap(), accepted.local_addr().unwrap());
    let known = was.tracked.len();
    reader.add_tracked(&mut was.tracked, [flow].iter());
    assert_eq!(was.tracked.len(), known + 1);
    reader.add_tracked(&mut was.tracked, [flow].iter());
    assert_eq!(was.tracked.len(), known + 1, "it was known");
    contents::take_down(&here).unwrap();
    let furnished = contents::Furnished::make(there, &was, &[joint(Kind::Veth, "br0")], "gw9x").unwrap();
    furnished.track(&was);
    let tuples = |namespace: &Namespace| {
        let text = namespace.inside(|| run("cat /proc/net/nf_conntrack")).unwrap();
        let mut lines: Vec<String> = text
            .lines()
            .filter(|line| line.contains("sport="))
            .map(|line| {
                line.split_whitespace()
                    .filter(|word| {
                        word.contains("src=")
                            || word.contains("dst=")
                            || word.contains("port=")
                            || word.contains("ASSURED")
                    })
                    .collect::<Vec<_>>()
                    .join(" ")
            })
            .collect();
        lines.sort();
        lines
    };
    assert_eq!(tuples(&here), tuples(furnished.namespace()));
}

#[test]
fn a_silenced_namespace_neither_answers_nor_speaks() {
    own_network();
    let here = joined(7);
    here.inside(|| run("ip link set lo up; ip addr add 10.9.0.1/24 dev eth0; ip link set eth0 up")).unwrap();
    let ping = |expected: bool| {
        run("ip neigh flush all");
        // Nobody listens: a refusal is an answer. A link that was just set up may lose the first request.
        let limit = Duration::from_secs(if expected { 10 } else { 1 });
        let answer = TcpStream::connect_timeout(&"10.9.0.1:9".parse().unwrap(), limit);
        assert_eq!(answer.unwrap_err().kind() == ErrorKind::ConnectionRefused, expected);
    };
    ping(true);
    let silence = Silence::impose(&here, "test").unwrap();
    ping(false);
    drop(silence);
    ping(true);
    let silence = Silence::impose_for_good(&here, "test").unwrap();
    ping(false);
    silence.end().unwrap();
    ping(true);
}

/// An address whose time runs down between two looks is not taken away for that: routes lean on it.
#[test]
fn addresses_that_age_keep_their_routes() {
    own_network();
    let (here, there) = (joined(7), Namespace::create().unwrap());
    let furnish = "
        ip link set lo up; ip link set eth0 up
        ip addr add 10.9.0.1/24 dev eth0 valid_lft 300 preferred_lft 200
        ip addr add 10.9.0.2/24 dev eth0 preferred_lft 200
        ip addr add fd09::1/64 dev eth0 nodad valid_lft 300 preferred_lft 200
        ip route add 10.5.0.0/16 via 10.9.0.254 src 10.9.0.1
        ip route add 10.6.0.0/16 via 10.9.0.254 src 10.9.0.2
        ip -6 route add fd10::/64 via fd09::fe src fd09::1
    ";
    here.inside(|| run(furnish)).unwrap();
    let was = contents::read(&here).unwrap();
    let mut furnished = contents::Furnished::make(there, &was, &[joint(Kind::Veth, "br0")], "gw8x").unwrap();
    std::thread::sleep(Duration::from_millis(2100));
    let now = contents::read(&here).unwrap();
    assert_ne!(was.addresses, now.addresses, "no time has passed");
    furnished.follow(&now).unwrap();
    let text = furnished.namespace().inside(|| run("ip route; ip -6 route; ip -o address show dev eth0")).unwrap();
    for words in [
        "10.5.0.0/16 via 10.9.0.254",
        "10.6.0.0/16 via 10.9.0.254",
        "fd10::/64 via fd09::fe",
        "src 10.9.0.1",
        "src 10.9.0.2",
    ] {
        assert!(text.contains(words), "{words} is not in {text}");
    }
    let lifetime = |text: &str| {
        let at = text.find("valid_lft ").unwrap() + "valid_lft ".len();
        text[at..].split("sec").next().unwrap().parse::<u32>().unwrap()
    };
    let line = text.lines().find(|line| line.contains("inet 10.9.0.1/")).unwrap();
    assert!(lifetime(line) <= 298, "{line}");
}
