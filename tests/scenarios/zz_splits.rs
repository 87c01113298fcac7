use anyhow::Result;
use godwit_tests::{Mode, TwoHosts};
fn splits(pid: u32) -> Result<usize> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let mut last = (String::new(), String::new());
    let mut n = 0;
    for line in text.lines() {
        let (range, rest) = line.split_once(' ').unwrap();
        let (start, end) = range.split_once('-').unwrap();
        if start == last.0 && rest == last.1 && rest.contains("00:00 0") { n += 1; }
        last = (end.to_owned(), rest.to_owned());
    }
    Ok(n)
}
#[test]
fn splits_of_churn() -> Result<()> {
    for mode in Mode::ALL {
        let hosts = TwoHosts::new()?;
        let servers = [hosts.destination.page_server(&hosts.token)?, hosts.source.page_server(&hosts.token)?];
        let mut victim = hosts.source.victim("churn", &[])?;
        victim.expect_beats(50)?;
        for number in 0..8 {
            let (from, to) = if number % 2 == 0 { (&hosts.source, &hosts.destination) } else { (&hosts.destination, &hosts.source) };
            let before = splits(victim.host_pid())?;
            let m = from.migrate(&servers[number % 2], victim.pid()).mode(mode).run()?;
            m.expect_moved()?;
            victim.follow(to, &m)?;
            let after = splits(victim.host_pid())?;
            let s = victim.status()?;
            println!("{} move {number}: splits {before} -> {after} errors {}", mode.word(), s.errors);
            std::thread::sleep(std::time::Duration::from_millis(100));
            println!("   later {} ", splits(victim.host_pid())?);
        }
        println!("{}", victim.log());
    }
    Ok(())
}
