//! Moves over long, lossy, disorderly and narrow ways.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::{Migration, Mode, Path, Trip, TwoHosts, expect_untouched};

/// Through half the world and a bad radio.
const LONG: Path =
    Path { delay: Duration::from_millis(50), lost_permille: 20, late_permille: 0, bytes_per_second: None, seed: 1 };
/// Every tenth packet is overtaken by others.
const DISORDERLY: Path = Path { lost_permille: 0, late_permille: 100, ..LONG };
/// 10 Mbit/s.
const NARROW: Path = Path {
    delay: Duration::from_millis(5),
    lost_permille: 0,
    late_permille: 0,
    bytes_per_second: Some(1_250_000),
    seed: 1,
};

/// Packets of the usual size: more of them to lose.
const MTU: u32 = 1500;

fn hosts(path: Path) -> Result<TwoHosts> {
    TwoHosts::builder().mtu(MTU).with_path_between(path).build()
}

/// Moves a victim that writes, in a mode, and expects that the path did something to the packets.
fn travel(path: Path, mode: Mode, seed: u64) -> Result<Migration> {
    let hosts = hosts(Path { seed, ..path })?;
    let arguments = ["2", "16", "1"];
    let migration = Trip::of("memory", &arguments).run_on(&hosts, mode)?;
    let relay = hosts.relay.as_ref().context("no relay")?;
    let (there, back) = (relay.there(), relay.back());
    ensure!(path.lost_permille == 0 || there.lost() > 20 && back.lost() > 0, "{there:?}, {back:?}");
    ensure!(path.late_permille == 0 || there.late() > 100 && back.late() > 0, "{there:?}, {back:?}");
    println!(
        "{}: {} ms, frozen for {} ms; {there:?}",
        mode.word(),
        migration.number("/total_ms")?,
        migration.number("/freeze_ms")?
    );
    Ok(migration)
}

macro_rules! travels {
    ($($test:ident: $path:ident $mode:ident;)*) => {$(
        #[test]
        fn $test() -> Result<()> {
            travel($path, Mode::$mode, line!().into()).map(drop)
        }
    )*};
}

travels! {
    long_and_lossy_hybrid: LONG Hybrid;
    long_and_lossy_pre_copy: LONG PreCopy;
    long_and_lossy_post_copy: LONG PostCopy;
    long_and_lossy_stop_and_copy: LONG StopAndCopy;
    disorderly_hybrid: DISORDERLY Hybrid;
    disorderly_pre_copy: DISORDERLY PreCopy;
    disorderly_post_copy: DISORDERLY PostCopy;
    disorderly_stop_and_copy: DISORDERLY StopAndCopy;
}

/// More is written in a second than the line takes: a freeze of 50 ms cannot be had. It is said so, with figures, and nothing happens.
#[test]
fn a_target_out_of_reach_of_a_narrow_line() -> Result<()> {
    let hosts = hosts(NARROW)?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let victim = hosts.source.victim("memory", &["2", "8", "4"])?;
    victim.expect_beats(5)?;
    let before = victim.view()?;
    let migrate = hosts.source.migrate(&server, victim.pid()).mode(Mode::PreCopy);
    let migration = migrate.arguments(&["--downtime-target", "50", "--max-rounds", "3"]).run()?;
    migration.expect(1, &["failed", "refused"])?;
    let text = migration.text();
    ensure!(text.contains("downtime target") && text.contains("the target is 50 ms"), "{text}");
    expect_untouched(&victim, &before).context(text)?;
    victim.finish().map(drop)
}

/// Light takes longer than the freeze is to last: that is known before the process is touched.
#[test]
fn a_target_out_of_reach_of_light() -> Result<()> {
    let hosts = hosts(Path { lost_permille: 0, ..LONG })?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let victim = hosts.source.victim("memory", &["1", "4", "0"])?;
    let before = victim.view()?;
    for mode in [Mode::Hybrid, Mode::PreCopy, Mode::PostCopy] {
        let migrate = hosts.source.migrate(&server, victim.pid()).mode(mode);
        let migration = migrate.arguments(&["--downtime-target", "100"]).run()?;
        migration.expect(1, &["refused"])?;
        ensure!(migration.text().contains("two round trips"), "{}", migration.text());
    }
    expect_untouched(&victim, &before)?;
    victim.finish().map(drop)
}

/// All of it inside the freeze, which takes as long as the line needs: whoever asks for that gets it.
#[test]
fn a_narrow_line_stop_and_copy() -> Result<()> {
    let hosts = hosts(NARROW)?;
    let migration = Trip::of("memory", &["1", "8", "0"]).run_on(&hosts, Mode::StopAndCopy)?;
    let freeze = migration.number("/freeze_ms")?;
    ensure!(freeze > 4000.0, "no time-out was near: frozen for {freeze} ms");
    Ok(())
}

/// The same without a wish for the length of the freeze: it moves, and the report says how long that took.
#[test]
fn a_narrow_line() -> Result<()> {
    let hosts = hosts(NARROW)?;
    let migration = Trip::of("memory", &["1", "4", "0"]).run_on(&hosts, Mode::Hybrid)?;
    let (total, pages) = (migration.number("/total_ms")?, migration.number("/pages_sent")?);
    ensure!(
        pages >= 1024.0 && pages * 4096.0 <= total / 1e3 * 1_250_000.0,
        "{pages} pages in {total} ms over 10 Mbit/s"
    );
    Ok(())
}
