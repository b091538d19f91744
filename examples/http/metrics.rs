//! Metrics of upgrades in Prometheus' text format: an observer for `Builder::on_event`, and counts that survive upgrades.
//! This file does not depend on HTTP, so you can copy it whole.
//!
//! The process that sees an upgrade succeed is about to end, so Prometheus would never scrape its count. Therefore the
//! counts of upgrades are in a memory file that every generation hands to the next. The other values belong to this
//! process. Prometheus expects the counters of a new process to start at 0.

use ecdysis::{Event, Starting};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

/// Positions in the memory file, which is an array of numbers. A later version may append some; missing ones read as 0.
#[derive(Clone, Copy)]
enum Shared {
    Ok,
    Failed,
    CommitMicros,
}

#[derive(Default)]
pub struct Metrics {
    shared: OnceLock<File>,
    generation: AtomicU64,
    requests: AtomicU64,
}

impl Metrics {
    /// Returns the observer for `Builder::on_event`.
    pub fn observer(self: &Arc<Self>) -> impl Fn(&Event<'_>) + Send + Sync + 'static {
        let metrics = self.clone();
        move |event| match event {
            Event::Serving { generation } => metrics.generation.store(*generation, Ordering::Relaxed),
            // Not `Committed`: a child that dies during its probation was committed, but the upgrade failed.
            Event::Upgraded(new) => {
                metrics.set(Shared::CommitMicros, new.commit.as_micros() as u64);
                metrics.set(Shared::Ok, metrics.get(Shared::Ok) + 1);
            }
            Event::UpgradeFailed { .. } => metrics.set(Shared::Failed, metrics.get(Shared::Failed) + 1),
            _ => {}
        }
    }

    /// Takes the counts from the parent, if it passed them, and passes them to the next generation.
    pub fn inherit(&self, starting: &Starting) -> Result<(), Box<dyn std::error::Error>> {
        let file = match starting.take_fd("metrics") {
            Some(file) => file,
            None => rustix::fs::memfd_create("metrics", rustix::fs::MemfdFlags::CLOEXEC)?,
        };
        starting.pass_fd("metrics", &file)?;
        self.shared.get_or_init(|| file.into());
        Ok(())
    }

    pub fn count_request(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    pub fn text(&self, connections: usize) -> String {
        let commit = self.get(Shared::CommitMicros) as f64 / 1e6;
        format!(
            "\
# HELP ecdysis_upgrades_total Upgrades of all generations, by outcome.
# TYPE ecdysis_upgrades_total counter
ecdysis_upgrades_total{{outcome=\"ok\"}} {}
ecdysis_upgrades_total{{outcome=\"failed\"}} {}
# HELP ecdysis_commit_seconds From the trigger of the last good upgrade until its new process served.
# TYPE ecdysis_commit_seconds gauge
ecdysis_commit_seconds {commit}
# HELP ecdysis_generation The generation that serves; the first is 1.
# TYPE ecdysis_generation gauge
ecdysis_generation {}
# HELP ecdysis_connections Connections open in this process.
# TYPE ecdysis_connections gauge
ecdysis_connections {connections}
# HELP http_requests_total Requests answered by this process.
# TYPE http_requests_total counter
http_requests_total {}
",
            self.get(Shared::Ok),
            self.get(Shared::Failed),
            self.generation.load(Ordering::Relaxed),
            self.requests.load(Ordering::Relaxed),
        )
    }

    fn get(&self, number: Shared) -> u64 {
        let mut bytes = [0; 8];
        let read = |file: &File| file.read_exact_at(&mut bytes, number as u64 * 8);
        match self.shared.get().map_or(Err(io::ErrorKind::NotFound.into()), read) {
            Ok(()) => u64::from_ne_bytes(bytes),
            Err(_) => 0,
        }
    }

    /// No lock is needed, because only the generation that serves calls this, in its one thread that upgrades.
    fn set(&self, number: Shared, value: u64) {
        if let Some(file) = self.shared.get() {
            let _ = file.write_all_at(&value.to_ne_bytes(), number as u64 * 8);
        }
    }
}
