//! Tables in Markdown, and pictures in SVG.

use std::fmt::Write;

/// A table of results.
pub struct Table {
    head: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(head: &[&str]) -> Self {
        Self { head: head.iter().map(|&h| h.into()).collect(), rows: Vec::new() }
    }

    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    pub fn markdown(&self) -> String {
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        let rule = "|---".repeat(self.head.len());
        let rows: String = self.rows.iter().map(|row| line(row)).collect();
        format!("{}{rule}|\n{rows}", line(&self.head))
    }
}

/// One bar of a picture.
pub struct Bar {
    pub name: String,
    pub value: f64,
    pub shown: String,
    /// Whether it is this library's, which determines the color.
    pub ours: bool,
}

/// Draws horizontal bars, as long as the values or their logarithms. (Some values differ by a factor of 300.)
pub fn bars(title: &str, logarithmic: bool, bars: &[Bar]) -> String {
    const LEFT: f64 = 210.0;
    const LENGTH: f64 = 360.0;
    const STEP: f64 = 26.0;
    let height = 46.0 + STEP * bars.len() as f64;
    let largest = bars.iter().map(|bar| bar.value).fold(f64::MIN_POSITIVE, f64::max);
    let smallest = bars.iter().map(|bar| bar.value).fold(largest, f64::min).max(largest * 1e-6);
    let length = |value: f64| {
        let share = if logarithmic {
            // The smallest value gets a tenth of the width.
            0.1 + 0.9 * (value.max(smallest) / smallest).ln() / (largest / smallest).ln().max(f64::MIN_POSITIVE)
        } else {
            value / largest
        };
        (share * LENGTH).max(1.0)
    };
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 720 {height:.0}\" width=\"720\" height=\"{height:.0}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"12\" y=\"24\" font-size=\"15\" font-weight=\"bold\">{}</text>\n",
        escape(title)
    );
    for (i, bar) in bars.iter().enumerate() {
        let y = 40.0 + STEP * i as f64;
        let color = if bar.ours { "#1f6f8b" } else { "#b8b8b8" };
        let length = length(bar.value);
        let _ = writeln!(
            svg,
            "<text x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"end\">{}</text>\
             <rect x=\"{LEFT:.0}\" y=\"{y:.0}\" width=\"{length:.1}\" height=\"18\" fill=\"{color}\"/>\
             <text x=\"{:.1}\" y=\"{:.0}\">{}</text>",
            LEFT - 8.0,
            y + 14.0,
            escape(&bar.name),
            LEFT + length + 6.0,
            y + 14.0,
            escape(&bar.shown)
        );
    }
    svg + "</svg>\n"
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
