//! Numbers as people read them.

use std::time::Duration;

/// Bytes of a page in these figures: the agent counts small pages.
pub(crate) const PAGE: u64 = 4096;

/// Gives a duration in milliseconds with its fraction.
pub(crate) fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Groups digits by three: `1,234,567`.
pub(crate) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// Puts a number before its noun: `1 page`, `2,000 pages`.
pub(crate) fn counted(number: u64, noun: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{} {noun}{plural}", count(number))
}

/// Gives bytes in the largest unit that keeps a digit before the point.
pub(crate) fn bytes(number: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if number < 1024 {
        return format!("{number} B");
    }
    let mut value = number as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if value < 10.0 { format!("{value:.1} {}", UNITS[unit]) } else { format!("{value:.0} {}", UNITS[unit]) }
}

/// Gives milliseconds, or seconds from one second up.
pub(crate) fn time(milliseconds: f64) -> String {
    match milliseconds {
        short if short < 10.0 => format!("{short:.2} ms"),
        medium if medium < 100.0 => format!("{medium:.1} ms"),
        long if long < 1000.0 => format!("{long:.0} ms"),
        longer => format!("{:.2} s", longer / 1e3),
    }
}

/// Gives microseconds, or milliseconds from one up.
pub(crate) fn short_time(microseconds: f64) -> String {
    if microseconds < 1000.0 { format!("{microseconds:.0} µs") } else { time(microseconds / 1e3) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_readable() {
        assert_eq!(count(0), "0");
        assert_eq!(count(999), "999");
        assert_eq!(count(1000), "1,000");
        assert_eq!(count(1_234_567), "1,234,567");
        assert_eq!(counted(1, "page"), "1 page");
        assert_eq!(counted(65_536, "page"), "65,536 pages");
        assert_eq!(bytes(12), "12 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(1 << 30), "1.0 GiB");
        assert_eq!(bytes(256 << 20), "256 MiB");
        assert_eq!(bytes(u64::MAX), "16384 PiB");
        assert_eq!(time(7.931), "7.93 ms");
        assert_eq!(time(42.04), "42.0 ms");
        assert_eq!(time(1240.0), "1.24 s");
        assert_eq!(short_time(87.4), "87 µs");
        assert_eq!(short_time(1513.0), "1.51 ms");
    }
}
