//! The result, as a table for people and as one line of JSON for programs.

use crate::load::{Seen, MARGIN};
use crate::operator::{Operator, Problem};
use crate::Options;
use hdrhistogram::Histogram;
use serde_json::{json, Value};
use std::fmt::Write;

pub struct Report<'a> {
    pub options: &'a Options,
    /// For UDP only: the results of the same load without upgrades.
    pub baseline: Option<Seen>,
    pub seen: Seen,
    pub operator: &'a Operator,
    /// When the load started, CLOCK_MONOTONIC in ns.
    pub start: u64,
    pub problem: Option<&'a Problem>,
}

impl Report<'_> {
    fn upgrades_ok(&self) -> usize {
        self.operator.upgrades.iter().filter(|u| u.error.is_none()).count()
    }

    fn upgrades_failed(&self) -> usize {
        self.operator.upgrades.len() - self.upgrades_ok()
    }

    pub fn good(&self) -> bool {
        let failed = match &self.baseline {
            // Compare the shares of failed requests, because the baseline is shorter.
            Some(baseline) => self.seen.failed() * baseline.requests() > baseline.failed() * self.seen.requests(),
            None => self.seen.failed() > 0,
        };
        !failed && self.seen.requests() > 0 && self.upgrades_ok() == self.options.upgrades && self.problem.is_none()
    }

    /// Returns the median and the longest time from the signal to the commit, over the successful upgrades, in ms.
    fn commit_ms(&self) -> Option<(f64, f64)> {
        let ok = self.operator.upgrades.iter().filter(|u| u.error.is_none());
        let mut ms: Vec<f64> = ok.map(|u| u.ms()).collect();
        ms.sort_by(f64::total_cmp);
        let median = (ms.get(ms.len() / 2)? + ms.get((ms.len() - 1) / 2)?) / 2.0;
        Some((median, *ms.last()?))
    }

    pub fn table(&self) -> String {
        let (seen, mut out) = (&self.seen, String::new());
        let mut row = |name: &str, text: String| writeln!(out, "{name:<18}{text}").expect("a String takes everything");
        let rate = seen.requests() as f64 / seen.seconds;
        row(
            "requests",
            format!("{} in {:.1} s, {} a second", thousands(seen.requests()), seen.seconds, thousands(rate as u64)),
        );
        row("failed", failures(seen));
        if let Some(baseline) = &self.baseline {
            let text = format!("{} requests in {:.1} s", thousands(baseline.requests()), baseline.seconds);
            row("without upgrades", format!("{text}, failed {}", failures(baseline)));
        }
        if seen.no_port > 0 {
            row("not sent", format!("{} requests, because no local port was free (EADDRNOTAVAIL)", seen.no_port));
        }
        if let Some(error) = &seen.first_error {
            row("first error", error.clone());
        }
        let (ok, failed) = (self.upgrades_ok(), self.upgrades_failed());
        row("upgrades", format!("{ok} ok, {failed} failed; generation now {}", self.operator.generation));
        if let Some(error) = self.operator.upgrades.iter().find_map(|u| u.error.as_ref()) {
            row("first failure", error.clone());
        }
        if let Some((median, worst)) = self.commit_ms() {
            row("signal to commit", format!("median {median:.1} ms, worst {worst:.1} ms"));
        }
        row("latency in ms", "    p50     p99   p99.9     max    requests".into());
        for (name, latency) in [("  during upgrades", &seen.during), ("  between them", &seen.between)] {
            let ms = |ns: u64| ns as f64 / 1e6;
            let p = |quantile| ms(latency.value_at_quantile(quantile));
            let (max, n) = (ms(latency.max()), thousands(latency.len()));
            row(name, format!("{:7.2} {:7.2} {:7.2} {max:7.2} {n:>11}", p(0.5), p(0.99), p(0.999)));
        }
        row("", format!("(an upgrade lasts from the signal to {} ms after the commit)", MARGIN.as_millis()));
        if let Some(problem) = self.problem {
            row("stopped early", problem.to_string());
        }
        out
    }

    pub fn json(&self) -> Value {
        let (seen, commit) = (&self.seen, self.commit_ms());
        let mut value = json!({
            "requests": seen.requests(),
            "failed": seen.failed(),
            "failures": failures_json(seen),
            "not_sent_no_local_port": seen.no_port,
            "upgrades_ok": self.upgrades_ok(),
            "upgrades_failed": self.upgrades_failed(),
            "upgrade_ms_median": commit.map(|(median, _)| median),
            "upgrade_ms_max": commit.map(|(_, worst)| worst),
            "latency_ms_during_upgrades": latency_json(&seen.during),
            "latency_ms_between_upgrades": latency_json(&seen.between),
            "generation": self.operator.generation,
            "seconds": seen.seconds,
            "problem": self.problem.map(|p| p.to_string()),
        });
        if let Some(baseline) = &self.baseline {
            value["without_upgrades"] = json!({
                "requests": baseline.requests(),
                "failed": baseline.failed(),
                "failures": failures_json(baseline),
            });
        }
        value
    }
}

/// Formats 1234567 as 1,234,567.
pub fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let group = |(at, digit)| if at > 0 && (digits.len() - at) % 3 == 0 { vec![',', digit] } else { vec![digit] };
    digits.chars().enumerate().flat_map(group).collect()
}

fn failures(seen: &Seen) -> String {
    let Seen { refused, reset, eof, timeout, other, .. } = seen;
    format!("{}: {refused} refused, {reset} reset, {eof} EOF, {timeout} timeout, {other} other", seen.failed())
}

fn failures_json(seen: &Seen) -> Value {
    let Seen { refused, reset, eof, timeout, other, .. } = seen;
    json!({ "refused": refused, "reset": reset, "eof": eof, "timeout": timeout, "other": other })
}

fn latency_json(latency: &Histogram<u64>) -> Value {
    let p = |quantile| latency.value_at_quantile(quantile) as f64 / 1e6;
    let max = latency.max() as f64 / 1e6;
    json!({ "requests": latency.len(), "p50": p(0.5), "p99": p(0.99), "p99.9": p(0.999), "max": max })
}
