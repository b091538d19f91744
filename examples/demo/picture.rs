//! Draws one upgrade as SVG, with a lane per generation and a tick per answer: the whole upgrade above, an enlarged view below.

use crate::operator::Life;
use crate::plot::text;
use crate::report::{thousands, Report};
use std::fmt::{Error, Write};

const LEFT: f64 = 120.0;
const RIGHT: f64 = 1180.0;
const LANE: f64 = 40.0;
const STARTS: &str = "#f3c48f";
const SERVES: &str = "#c9dcf2";
const DRAINS: &str = "#ddd";
const ANSWER: &str = "#1f4e8c";
const MARK: &str = "#b4540a";

/// A period of time, and its place in the picture.
struct Panel {
    top: f64,
    from: u64,
    to: u64,
}

impl Panel {
    fn x(&self, at: u64) -> f64 {
        let share = (at as f64 - self.from as f64) / (self.to - self.from) as f64;
        LEFT + (RIGHT - LEFT) * share.clamp(0.0, 1.0)
    }

    /// Draws the lanes of all generations that are alive in this period. Returns the lower edge of the last lane.
    fn lanes(&self, out: &mut String, report: &Report) -> Result<f64, Error> {
        let (operator, mut y) = (report.operator, self.top);
        let end = |life: &Life| life.ended.unwrap_or(u64::MAX);
        for life in operator.lives.iter().filter(|life| life.began < self.to && end(life) > self.from) {
            // It serves from one commit to the next. The first generation serves as soon as it is ready.
            let ok = operator.upgrades.iter().filter(|u| u.error.is_none()).map(|u| u.end);
            let mut commits = [life.ready].into_iter().chain(ok).skip(life.generation as usize - 1);
            let serves = commits.next().unwrap_or(life.ready);
            let handed_over = commits.next().unwrap_or(u64::MAX);
            text(out, LEFT - 10.0, y + 0.5 * LANE, "end", "#222", &format!("generation {}", life.generation))?;
            for (from, to, color) in
                [(life.began, serves, STARTS), (serves, handed_over, SERVES), (handed_over, end(life), DRAINS)]
            {
                let (x, width, height) = (self.x(from), self.x(to) - self.x(from), LANE - 8.0);
                if width > 0.0 {
                    writeln!(out, r#"<rect x="{x:.1}" y="{y}" width="{width:.1}" height="{height}" fill="{color}"/>"#)?;
                }
            }
            let answers = report.seen.points.iter().filter(|point| point.generation == life.generation);
            let times = answers.map(|point| point.start + point.latency).filter(|at| (self.from..self.to).contains(at));
            // At most one tick per half pixel: there are more answers per second than places in the picture.
            let mut places: Vec<_> = times.map(|at| (self.x(at) * 2.0) as u32).collect();
            places.sort_unstable();
            places.dedup();
            let ticks: String = places.iter().map(|x| format!("M{} {}v16", f64::from(*x) / 2.0, y + 8.0)).collect();
            writeln!(out, r#"<path d="{ticks}" stroke="{ANSWER}" stroke-width="0.7"/>"#)?;
            y += LANE;
        }
        Ok(y)
    }

    /// Draws the time axis, in milliseconds from `zero`.
    fn axis(&self, out: &mut String, y: f64, zero: u64) -> Result<(), Error> {
        let ms = |at: u64| (at as f64 - zero as f64) / 1e6;
        let (from, to) = (ms(self.from), ms(self.to));
        let step = [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0];
        let step = step.into_iter().find(|step| (to - from) / step <= 14.0).unwrap_or(1000.0);
        for number in (from / step).ceil() as i64..=(to / step) as i64 {
            let at = number as f64 * step;
            let label = format!("{} ms", (at * 10.0).round() / 10.0);
            text(out, LEFT + (RIGHT - LEFT) * (at - from) / (to - from), y + 12.0, "middle", "#444", &label)?;
        }
        Ok(())
    }
}

pub fn draw(report: &Report) -> Result<String, Box<dyn std::error::Error>> {
    let operator = report.operator;
    // The upgrade of median length is neither the best nor the worst. Skip the last one, because the load ends after it.
    let mut ok: Vec<_> = operator.upgrades.iter().filter(|u| u.error.is_none()).collect();
    ok.truncate(ok.len().saturating_sub(1).max(1));
    ok.sort_by_key(|u| u.end.saturating_sub(u.signal));
    let upgrade = ok.get(ok.len() / 2).ok_or("no upgrade to draw")?;
    let new = operator.lives.iter().find(|life| (upgrade.signal..upgrade.end).contains(&life.began));
    let (every, length) = (report.options.every.as_nanos() as u64, upgrade.end - upgrade.signal);

    let wide = Panel { top: 84.0, from: upgrade.signal - every / 2, to: upgrade.signal + every * 3 / 2 };
    let mut body = String::new();
    let wide_end = wide.lanes(&mut body, report)?;
    wide.axis(&mut body, wide_end, upgrade.signal)?;
    let close = Panel { top: wide_end + 90.0, from: upgrade.signal - length / 3, to: upgrade.end + length / 2 };
    let close_end = close.lanes(&mut body, report)?;
    close.axis(&mut body, close_end, upgrade.signal)?;

    let mark = |out: &mut String, at: u64, anchor: &str, label: &str| {
        let (x, gap) = (close.x(at), if anchor == "end" { -4.0 } else { 4.0 });
        writeln!(out, r#"<path d="M{x:.1} {}V{close_end}" stroke="{MARK}"/>"#, close.top - 20.0)?;
        text(out, x + gap, close.top - 10.0, anchor, MARK, label)
    };
    mark(&mut body, upgrade.signal, "end", "SIGHUP")?;
    if let Some(new) = new {
        let y = close_end - 0.5 * LANE;
        text(&mut body, close.x(new.began) - 6.0, y, "end", MARK, "the new program starts")?;
        mark(&mut body, new.ready, "end", "it is ready")?;
    }
    mark(&mut body, upgrade.end, "start", &format!("commit, {:.1} ms", upgrade.ms()))?;

    let (mut out, height) = (String::new(), close_end + 24.0);
    writeln!(
        out,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1200 {height}" font-family="sans-serif" font-size="13">
<rect width="1200" height="{height}" fill="#fff"/>
<text x="24" y="32" font-size="20">Who answers while the server is replaced</text>
<text x="24" y="55" fill="#444">{} clients at full speed; the median of {} upgrades; {} of {} requests failed</text>
<path d="M{:.1} {}V{wide_end}L{LEFT} {}V{close_end}H{RIGHT}V{}L{:.1} {wide_end}V{}Z" fill="#f4f4f4"/>"##,
        report.options.clients,
        ok.len(),
        report.seen.failed(),
        thousands(report.seen.requests()),
        wide.x(close.from),
        wide.top - 4.0,
        close.top - 34.0,
        close.top - 34.0,
        wide.x(close.to),
        wide.top - 4.0,
    )?;
    let mut x = 720.0;
    for (color, label) in
        [(STARTS, "starts"), (SERVES, "accepts"), (DRAINS, "probation, drain"), (ANSWER, "a request answered")]
    {
        writeln!(out, r#"<rect x="{x}" y="45" width="12" height="12" fill="{color}"/>"#)?;
        text(&mut out, x + 18.0, 55.0, "start", "#222", label)?;
        x += 40.0 + 6.6 * label.len() as f64;
    }
    writeln!(out, "{body}</svg>")?;
    Ok(out)
}
