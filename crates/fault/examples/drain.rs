//! Measures a drain over loopback: `drain [MIB] [TOUCHES] [PAUSE_US]`, once while the program touches pages at random and once quiet.

#[path = "../tests/support/program.rs"]
#[allow(dead_code, reason = "tests use more of it")]
mod program;

use std::net::SocketAddr;
use std::time::Instant;

use godwit_carry::{Party, Token};
use godwit_fault::{DrainReport, FaultListenerConfig, FaultService, FrozenProcess, Migration, MigrationId, PageSource};
use program::{End, pages};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let number = |index, default| std::env::args().nth(index).map_or(Ok(default), |text| text.parse::<u64>());
    let (mib, touches, pause) = (number(1, 256)?, number(2, 4000)?, number(3, 50)?);
    let count = mib * 256;
    let source = End::source(count);
    for (name, touches) in [("with faults", touches), ("quiet", 0)] {
        let (mut end, uffd) = End::program(count);
        let started = Instant::now();
        let report = run(&source, (&mut end, uffd), (count, touches, pause))?;
        let seconds = started.elapsed().as_secs_f64();
        println!("{name}: {mib} MiB in {:.0} ms, {:.0} MB/s", seconds * 1e3, mib as f64 * 1.048_576 / seconds);
        println!(
            "  service: {} faults, p50 {} p99 {} longest {} µs, {} pages",
            report.faults, report.p50_us, report.p99_us, report.longest_us, report.pages
        );
        println!("  all pages: {}", end.ask(&format!("verify 0 0 {count}")));
    }
    Ok(())
}

fn run(
    source: &End,
    (end, uffd): (&mut End, godwit_kernel::uffd::Userfaultfd),
    (count, touches, pause): (u64, u64, u64),
) -> Result<DrainReport, Box<dyn std::error::Error>> {
    let any: SocketAddr = "127.0.0.1:0".parse()?;
    let token = Token::from_bytes(&[7; 32])?;
    let service = FaultService::start(FaultListenerConfig::new(any, any, token.clone()))?;
    let id = MigrationId([3; 16]);
    let handle = service.adopt(Migration {
        id,
        party: Party::TokenHolders,
        pid: end.pid(),
        uffd,
        pending: pages(0, count),
        at_end: None,
    })?;
    let pages = PageSource::new(service.faults_addr(), service.drain_addr(), (token, Party::TokenHolders), id);
    let reader = FrozenProcess::open(source.pid())?;
    std::thread::scope(|scope| {
        let served = scope.spawn(|| pages.run(reader));
        if touches > 0 {
            println!("  program: {}", end.ask(&format!("touch {count} {touches} 1 {pause}")));
        }
        let report = handle.wait()?;
        served.join().expect("the source does not panic")?;
        Ok(report)
    })
}
