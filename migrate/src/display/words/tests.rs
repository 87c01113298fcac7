use super::*;
use crate::event::Round;
use crate::report::Obstacle;
use crate::request::Request;

fn report(outcome: Outcome) -> Report {
    Report { outcome, ..Report::new(&Request::new(42, "host")) }
}

#[test]
fn a_phase_is_one_line() {
    assert_eq!(
        line(&Event::phase("probe"), "host").unwrap(),
        "probe: looking for everything that could stand in the way"
    );
    for silent in ["freeze", "collect", "final-round", "rebuild", "commit", "round", "done"] {
        assert_eq!(line(&Event::phase(silent), "host"), None, "{silent}");
    }
    let round = Round { number: 2, pages: 65_536, bytes: 200 << 20, dirty_pages: 1, elapsed_ms: 312.0 };
    assert_eq!(
        line(&Event::Round(round), "host").unwrap(),
        "round 2: 65,536 pages in 312 ms, 200 MiB on the wire; 1 page written meanwhile"
    );
    assert_eq!(
        line(&Event::Running { dest_pid: 42, freeze_ms: 7.934 }, "host").unwrap(),
        "freeze: over after 7.93 ms; runs on host as process 42"
    );
    let faults = Faults { count: 12, p50_us: 87.0, p99_us: 1500.0 };
    assert_eq!(
        line(&Event::Drained { drain_ms: 40.0, faults }, "host").unwrap(),
        "drain: all pages arrived after 40.0 ms, 12 pages waited for, p50 87 µs p99 1.50 ms"
    );
}

#[test]
fn the_bar_has_its_figures() {
    let progress = Progress {
        phase: "round".into(),
        round: 1,
        pages_done: 1000,
        pages_total: 65_536,
        bytes_on_wire: 1,
        rate_bytes_per_s: f64::from(400 << 20),
        dirty_rate_pages_per_s: 5120.0,
        eta_ms: Some(2400.0),
    };
    assert_eq!(figures(&progress), "1,000/65,536 pages  400 MiB/s  dirty 20 MiB/s  ETA 2 s");
    assert_eq!(title("round", 1), "round 1");
    assert_eq!(title("drain", 0), "drain");
    let odd = Progress { rate_bytes_per_s: f64::NAN, eta_ms: Some(f64::INFINITY), ..Progress::default() };
    assert_eq!(figures(&odd), "0/0 pages  0 B/s  ETA inf s");
}

#[test]
fn a_move_is_told_in_two_lines() {
    let mut report = report(Outcome::Moved);
    report.dest_pid = Some(42);
    report.total_ms = 1240.0;
    report.freeze_ms = 7.93;
    report.freeze = Freeze { stop: 0.2, collect: 1.1, final_round: 0.81, rebuild: 3.2, commit: 0.4, resume: 2.22 };
    report.rounds = 6;
    report.pages_total = 65_536;
    report.pages_sent = 70_000;
    report.bytes_on_wire = 1 << 28;
    assert_eq!(
        summary(&report, "host"),
        [
            "Process 42 moved to host in 1.24 s, frozen for 7.93 ms (stop 0.20, collect 1.10, final round 0.81, rebuild 3.20, \
             commit 0.40, resume 2.22).",
            "hybrid: 6 rounds, 65,536 pages with content, 70,000 sent, 256 MiB on the wire; no page was left for later.",
        ]
    );
    report.drain_ms = 40.0;
    assert!(summary(&report, "host")[1].ends_with("the last pages came 40.0 ms after it, no page was waited for."));
    report.dest_pid = Some(7);
    report.mode = Mode::PreCopy;
    let lines = summary(&report, "host");
    assert!(lines[0].contains("(process 7 there)"));
    assert!(!lines[1].contains("last pages"));
}

#[test]
fn all_obstacles_are_listed_with_their_ways_out() {
    let mut report = report(Outcome::Refused);
    let obstacle = |resource: &str, remedy: &str| Obstacle {
        resource: resource.to_owned(),
        text: "leads outside".to_owned(),
        remedy: remedy.to_owned(),
    };
    report.obstacles = vec![obstacle("fd 1 (a \x1b[2Jterminal)", "--external 'fd[1]=null'"), obstacle("fd 7", "")];
    assert_eq!(
        summary(&report, "host"),
        [
            "Process 42 was not moved, running as before: 2 things stand in the way.",
            "  1. fd 1 (a ?[2Jterminal): leads outside",
            "     Way out: --external 'fd[1]=null'",
            "  2. fd 7: leads outside",
        ]
    );
}

#[test]
fn a_failure_says_what_where_and_what_to_do() {
    let mut report = report(Outcome::Failed);
    report.error = Some(Failure {
        phase: "rebuild".to_owned(),
        resource: "/usr/bin/redis-server".to_owned(),
        text: "it changed since the probe.".to_owned(),
        remedy: "install the same version".to_owned(),
    });
    assert_eq!(
        summary(&report, "host"),
        [
            "Process 42 could not be moved (phase rebuild): /usr/bin/redis-server: it changed since the probe. Here it is running as before.",
            "What to do: install the same version",
        ]
    );
    report.outcome = Outcome::Unknown;
    report.source_state = SourceState::Frozen;
    report.error = None;
    let lines = summary(&report, "host");
    assert_eq!(lines[0], "Process 42 may or may not run at the destination. Here it is kept frozen.");
    assert!(lines[1].contains("kill -KILL 42"));
    report.outcome = Outcome::Cancelled;
    report.source_state = SourceState::RunningAsBefore;
    assert_eq!(summary(&report, "host"), ["Process 42 was not moved: cancelled. Here it is running as before."]);
}
