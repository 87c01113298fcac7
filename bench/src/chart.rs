//! The chart: freeze against memory, both logarithmic, as a standalone SVG.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::figures::{Engine, Metric, Summary};

const WIDTH: f64 = 820.0;
const HEIGHT: f64 = 480.0;
/// The plot's edges.
const LEFT: f64 = 70.0;
const RIGHT: f64 = 600.0;
const TOP: f64 = 50.0;
const BOTTOM: f64 = 420.0;
/// Colours that are told apart by most eyes and on paper (Okabe and Ito).
const COLOURS: [&str; 7] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"];

/// A line of the chart: points of MiB and ms.
type Line = Vec<(f64, f64)>;

/// One axis: what lies at its ends.
#[derive(Clone, Copy, Debug)]
struct Axis {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Axis {
    /// Makes an axis that holds all values, from one power of `base` to another.
    fn holding(values: impl Iterator<Item = f64> + Clone, base: f64, (from, to): (f64, f64)) -> Self {
        let low = values.clone().fold(f64::INFINITY, f64::min).log(base).floor();
        let high = values.fold(0.0, f64::max).log(base).ceil();
        Self { low: base.powf(low), high: base.powf(high.max(low + 1.0)), from, to }
    }

    fn place(&self, value: f64) -> f64 {
        self.from + (self.to - self.from) * (value / self.low).ln() / (self.high / self.low).ln()
    }
}

/// Draws the chart.
#[must_use]
pub fn render(summaries: &[Summary]) -> String {
    let lines = lines(summaries);
    let points = || lines.values().flatten();
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
         font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n"
    );
    text(&mut svg, (LEFT, 28.0), "start", "How long a process does not run when it moves");
    if points().next().is_none() {
        text(&mut svg, (LEFT, 80.0), "start", "nothing was measured");
        return svg + "</svg>\n";
    }
    let across = Axis::holding(points().map(|point| point.0), 2.0, (LEFT, RIGHT));
    let up = Axis::holding(points().map(|point| point.1), 10.0, (BOTTOM, TOP));
    draw_axes(&mut svg, &across, &up, points().map(|point| point.0 as u64));
    for ((number, (name, line)), colour) in lines.iter().enumerate().zip(COLOURS.iter().cycle()) {
        draw_line(&mut svg, line, &across, &up, colour);
        let y = TOP + 12.0 + 22.0 * number as f64;
        let _ = writeln!(
            svg,
            "<rect x=\"{}\" y=\"{}\" width=\"14\" height=\"4\" fill=\"{colour}\"/>",
            RIGHT + 20.0,
            y - 6.0
        );
        text(&mut svg, (RIGHT + 40.0, y), "start", name);
    }
    svg + "</svg>\n"
}

/// Freezes by name of the line; where the engine reports none, what the process saw.
fn lines(summaries: &[Summary]) -> BTreeMap<String, Line> {
    let mut lines: BTreeMap<String, Line> = BTreeMap::new();
    for one in summaries {
        let freeze = one.median(Metric::FreezeMs).or_else(|| one.median(Metric::OwnGapMs));
        let Some(freeze) = freeze.filter(|freeze| *freeze > 0.0) else { continue };
        let name = match one.engine {
            Engine::Godwit => one.scenario.name().to_owned(),
            Engine::Criu => format!("CRIU {}", one.scenario.name()),
        };
        lines.entry(name).or_default().push((one.size_mib as f64, freeze));
    }
    lines
}

fn draw_axes(svg: &mut String, across: &Axis, up: &Axis, sizes: impl Iterator<Item = u64>) {
    let sizes: std::collections::BTreeSet<u64> = sizes.collect();
    for size in sizes {
        let x = across.place(size as f64);
        grid(svg, (x, BOTTOM), (x, TOP));
        text(svg, (x, BOTTOM + 20.0), "middle", &size.to_string());
    }
    let mut decade = up.low;
    while decade <= up.high * 1.001 {
        for step in [1.0, 2.0, 5.0] {
            let value = decade * step;
            if value <= up.high * 1.001 {
                grid(svg, (LEFT, up.place(value)), (RIGHT, up.place(value)));
                text(svg, (LEFT - 8.0, up.place(value) + 4.0), "end", &value.to_string());
            }
        }
        decade *= 10.0;
    }
    text(svg, (f64::midpoint(LEFT, RIGHT), BOTTOM + 44.0), "middle", "memory of the process in MiB");
    text(svg, (LEFT - 8.0, TOP - 10.0), "end", "ms");
}

fn draw_line(svg: &mut String, line: &Line, across: &Axis, up: &Axis, colour: &str) {
    let places: Vec<(f64, f64)> = line.iter().map(|(size, freeze)| (across.place(*size), up.place(*freeze))).collect();
    let path: Vec<String> = places.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    let _ =
        writeln!(svg, "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>", path.join(" "));
    for ((x, y), (_, freeze)) in places.iter().zip(line) {
        let _ = writeln!(
            svg,
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\" fill=\"{colour}\"><title>{freeze:.1} ms</title></circle>"
        );
    }
}

fn grid(svg: &mut String, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) {
    let _ = writeln!(svg, "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"#ddd\"/>");
}

/// Puts words down; they are ours, nothing in them needs escaping.
fn text(svg: &mut String, (x, y): (f64, f64), anchor: &str, words: &str) {
    let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{words}</text>");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figures::{Figures, Run, summarise};
    use crate::plan::Scenario;

    #[test]
    fn every_kind_has_a_line() {
        let run = |scenario, size_mib, freeze| Run {
            engine: Engine::Godwit,
            scenario,
            size_mib,
            noisy: false,
            figures: Figures::from([(Metric::FreezeMs, freeze)]),
        };
        let runs = [
            run(Scenario::HybridIdle, 16, 3.0),
            run(Scenario::HybridIdle, 4096, 4.0),
            run(Scenario::PostCopy, 16, 40.0),
        ];
        let svg = render(&summarise(&runs));
        assert_eq!(svg.matches("<polyline").count(), 2);
        assert_eq!(svg.matches("<circle").count(), 3);
        assert!(svg.contains(">4096<") && svg.contains(">post-copy<") && svg.ends_with("</svg>\n"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
        assert!(render(&[]).contains("nothing was measured"));
    }

    #[test]
    fn an_axis_holds_its_values() {
        let axis = Axis::holding([3.0, 70.0].into_iter(), 10.0, (100.0, 0.0));
        assert_eq!((axis.low, axis.high), (1.0, 100.0));
        assert!((axis.place(10.0) - 50.0).abs() < 1e-9);
        let single = Axis::holding([10.0].into_iter(), 10.0, (100.0, 0.0));
        assert!(single.high > single.low);
    }
}
