//! Draws latency over time as SVG, with each upgrade marked. SVG is text, so this needs no library.

use crate::load::Point;
use crate::report::{thousands, Report};
use std::fmt::{self, Write};

// The frame, in pixels.
const LEFT: f64 = 72.0;
const RIGHT: f64 = 1180.0;
const TOP: f64 = 84.0;
const BOTTOM: f64 = 460.0;
/// Each column of this many pixels shows the median, the 99th percentile and the slowest of its requests.
const COLUMN: f64 = 3.0;

const MEDIAN: &str = "#1f4e8c";
const BAND: &str = "#9dbfe6";
const SLOWEST: &str = "#555";
const UPGRADE: &str = "#e8862e";
const FAILED: &str = "#d01c1c";

pub fn draw(report: &Report) -> Result<String, Box<dyn std::error::Error>> {
    let mut svg = String::new();
    let out = &mut svg;
    let (seen, upgrades) = (&report.seen, &report.operator.upgrades);
    let seconds = |at: u64| at.saturating_sub(report.start) as f64 / 1e9;
    let x = |at: u64| LEFT + (RIGHT - LEFT) * seconds(at) / seen.seconds;

    let mut columns = vec![vec![]; ((RIGHT - LEFT) / COLUMN) as usize + 1];
    for &Point { start, latency, .. } in &seen.points {
        let column = ((x(start) - LEFT) / COLUMN) as usize;
        if let Some(column) = columns.get_mut(column) {
            column.push(latency);
        }
    }
    // x, then ms: median, 99th percentile, slowest
    let mut shown = vec![];
    for (number, mut column) in columns.into_iter().enumerate() {
        column.sort_unstable();
        if let Some(last) = column.len().checked_sub(1) {
            let ms = |share: f64| column[(last as f64 * share) as usize] as f64 / 1e6;
            shown.push((LEFT + COLUMN * (number as f64 + 0.5), ms(0.5), ms(0.99), ms(1.0)));
        }
    }
    let least = shown.iter().map(|c| c.1).fold(0.1, f64::min);
    let most = shown.iter().map(|c| c.3).fold(1.0, f64::max);
    let (low, high) = (least.log10() - 0.1, most.log10() + 0.1);
    let y = |ms: f64| BOTTOM - (BOTTOM - TOP) * (ms.log10() - low) / (high - low);

    writeln!(
        out,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1200 510" width="1200" height="510" font-family="sans-serif" font-size="13">
<rect width="1200" height="510" fill="#fff"/>
<text x="{LEFT}" y="32" font-size="20">Request latency while the server is replaced {} times</text>
<text x="{LEFT}" y="55" fill="#444">{} requests by {} clients at full speed, {} failed</text>"##,
        upgrades.len(),
        thousands(seen.requests()),
        report.options.clients,
        seen.failed(),
    )?;

    writeln!(out, r##"<path d="M{LEFT} {BOTTOM}H{RIGHT}" stroke="#bbb"/>"##)?;
    // The grid: a line per decade, and fainter lines at 2 and 5. The time labels are one or more seconds apart.
    for decade in low.floor() as i32..=high as i32 {
        for (digit, color) in [(1.0, "#bbb"), (2.0, "#eee"), (5.0, "#eee")] {
            let ms = digit * 10f64.powi(decade);
            if (TOP..BOTTOM).contains(&y(ms)) {
                writeln!(out, r#"<path d="M{LEFT} {0:.1}H{RIGHT}" stroke="{color}"/>"#, y(ms))?;
                if digit == 1.0 {
                    text(out, LEFT - 8.0, y(ms) + 4.0, "end", "#444", &format!("{ms} ms"))?;
                }
            }
        }
    }
    let step =
        [1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0].into_iter().find(|s| seen.seconds / s <= 20.0).unwrap_or(1800.0);
    let mut second = 0.0;
    while second <= seen.seconds {
        let x = LEFT + (RIGHT - LEFT) * second / seen.seconds;
        text(out, x, BOTTOM + 20.0, "middle", "#444", &format!("{second} s"))?;
        second += step;
    }

    for upgrade in upgrades {
        let (from, to) = (x(upgrade.signal), x(upgrade.end));
        let (width, height, color) =
            ((to - from).max(1.5), BOTTOM - TOP + 8.0, if upgrade.error.is_some() { FAILED } else { UPGRADE });
        writeln!(
            out,
            r#"<rect x="{from:.1}" y="{}" width="{width:.1}" height="{height}" fill="{color}" fill-opacity="0.55"/>"#,
            TOP - 8.0
        )?;
    }
    let there = shown.iter().map(|c| format!("{:.1},{:.1} ", c.0, y(c.1)));
    let back = shown.iter().rev().map(|c| format!("{:.1},{:.1} ", c.0, y(c.2)));
    let band: String = there.clone().chain(back).collect();
    writeln!(out, r#"<polygon points="{band}" fill="{BAND}" fill-opacity="0.7"/>"#)?;
    let median: String = there.collect();
    writeln!(out, r#"<polyline points="{median}" fill="none" stroke="{MEDIAN}" stroke-width="1.5"/>"#)?;
    for column in &shown {
        writeln!(out, r#"<circle cx="{:.1}" cy="{:.1}" r="1.3" fill="{SLOWEST}"/>"#, column.0, y(column.3))?;
    }
    for &at in &seen.failed_at {
        text(out, x(at), TOP + 4.0, "middle", FAILED, "✕")?;
    }

    let legend = [
        (MEDIAN, "median"),
        (BAND, "median to 99th percentile"),
        (SLOWEST, "slowest"),
        (UPGRADE, "upgrade, from signal to commit"),
        (FAILED, "failed"),
    ];
    let mut x = 520.0;
    for (color, label) in legend {
        writeln!(out, r#"<rect x="{x}" y="45" width="12" height="12" fill="{color}"/>"#)?;
        text(out, x + 18.0, 55.0, "start", "#222", label)?;
        x += 40.0 + 6.6 * label.len() as f64;
    }
    writeln!(out, "</svg>")?;
    Ok(svg)
}

pub fn text(out: &mut String, x: f64, y: f64, anchor: &str, color: &str, text: &str) -> fmt::Result {
    writeln!(out, r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}" fill="{color}">{text}</text>"#)
}
