//! The same small server with `ecdysis` 1.1.1, as its documentation shows it for synchronous programs.

use std::io;
use std::thread;

use ecdysis_bench::rate::{count, report_rate};
use ecdysis_bench::{answer, hear, say_serving, say_upgraded, sys, Args};

fn main() -> io::Result<()> {
    sys::mark("main");
    let args = Args::get();
    if args.by_signal() {
        sys::block_hangup();
    }
    let mut server = old::Ecdysis::new();
    let listeners = args.addresses().map(|a| server.listen_tcp(a)).collect::<io::Result<Vec<_>>>()?;
    server.ready()?;
    sys::mark("ready");
    if args.text("way") != Some("count") {
        say_serving();
    }
    let listeners = &*listeners.leak();
    if args.text("way") == Some("count") {
        thread::spawn(move || listeners[0].incoming().flatten().for_each(count));
        return report_rate(&listeners[0]);
    }
    for _ in 0..args.number("threads", 1) {
        thread::spawn(move || listeners[0].incoming().flatten().for_each(answer));
    }
    if args.by_signal() {
        sys::wait_hangup();
    } else if hear() != "upgrade" {
        return Ok(());
    }
    sys::mark("begin");
    let since = sys::now();
    server.upgrade().map_err(|e| io::Error::other(e.to_string()))?;
    let committed = sys::now();
    sys::mark("end");
    say_upgraded(since, committed);
    Ok(())
}
