//! The matrix as a table for people.

use super::{Entry, Fault, MODES, Point};

/// Draws a table for each mode, in Markdown: a line for each point, a column for each fault.
pub fn table(entries: &[Entry]) -> String {
    let faults: Vec<Fault> =
        Fault::ALL.into_iter().filter(|fault| entries.iter().any(|entry| entry.cell.fault == *fault)).collect();
    let mut text = String::new();
    for mode in MODES {
        let titles: Vec<&str> = faults.iter().map(|fault| fault.title()).collect();
        text += &format!("| {} | {} |\n|{}\n", mode.word(), titles.join(" | "), "---|".repeat(faults.len() + 1));
        for point in Point::all().filter(|point| point.is_in(mode)) {
            let at = |fault: &Fault| {
                let cell =
                    |entry: &&Entry| entry.cell.mode == mode && entry.cell.point == point && entry.cell.fault == *fault;
                entries.iter().find(cell).map_or_else(String::new, word)
            };
            let words: Vec<String> = faults.iter().map(at).collect();
            if words.iter().any(|word| !word.is_empty()) {
                text += &format!("| {} | {} |\n", point.title(), words.join(" | "));
            }
        }
        text.push('\n');
    }
    if entries.iter().any(|entry| entry.seen.as_ref().is_ok_and(|seen| seen.entry_stays)) {
        text += "\\* An entry stays in the destination's journal: the source's last word was lost.\n";
    }
    text
}

fn word(entry: &Entry) -> String {
    match (&entry.seen, entry.reason()) {
        (Ok(seen), None) => seen.to_string(),
        (Ok(seen), Some(_)) => format!("**{seen}, against expectation**"),
        (Err(_), Some(_)) => "(not yet)".to_owned(),
        (Err(_), None) => "**does not hold**".to_owned(),
    }
}
