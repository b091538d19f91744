//! `examples/kv` under systemd: `systemctl restart` keeps either all of its values and connections, or none.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::bed::{under_systemd, Machine, Service};
use crate::support::{eventually, DEADLINE};

const ADDRESS: &str = "127.0.0.1:7070";

struct Client(BufReader<TcpStream>);

impl Client {
    fn connect() -> Self {
        let stream = TcpStream::connect(ADDRESS).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        Self(BufReader::new(stream))
    }

    /// `None` if the connection has ended.
    fn ask(&mut self, request: &str) -> Option<String> {
        self.0.get_mut().write_all(format!("{request}\n").as_bytes()).ok()?;
        let mut line = String::new();
        self.0.read_line(&mut line).ok().filter(|length| *length > 0)?;
        Some(line.trim_end().to_owned())
    }
}

fn kv<'a>(machine: &'a Machine, store: u32) -> Service<'a> {
    machine.install("kv");
    let unit = format!(
        "[Service]\nType=notify-reload\nExecStart=/usr/local/bin/kv {ADDRESS}\nFileDescriptorStoreMax={store}\n"
    );
    machine.unit("kv.service", &unit);
    let service = machine.service("kv", "");
    service.start();
    service
}

#[test]
#[ignore = "needs root, cgroup2, overlayfs and apt"]
fn a_restart_keeps_values_and_connections() {
    under_systemd("passed::a_restart_keeps_values_and_connections", |machine| {
        let service = kv(&machine, 64);
        let stop = AtomicBool::new(false);
        let requests: u64 = thread::scope(|scope| {
            let clients: Vec<_> = (0..8)
                .map(|number| {
                    let (stop, mut client) = (&stop, Client::connect());
                    scope.spawn(move || {
                        let mut count = 0;
                        while !stop.load(Ordering::Relaxed) {
                            count += 1;
                            assert_eq!(client.ask(&format!("set key-{number} {count}")).as_deref(), Some("ok"));
                            assert_eq!(
                                client.ask(&format!("get key-{number}")),
                                Some(count.to_string()),
                                "a value was lost"
                            );
                        }
                        2 * count
                    })
                })
                .collect();
            for _ in 0..3 {
                service.succeed("restart");
                assert_eq!(Client::connect().ask("version").as_deref(), Some("1"));
                service.succeed("reload");
                assert_eq!(Client::connect().ask("version").as_deref(), Some("2"));
            }
            stop.store(true, Ordering::Relaxed);
            clients.into_iter().map(|client| client.join().unwrap()).sum()
        });
        println!("{requests} requests, 0 failed");
        assert_eq!(Client::connect().ask("count").as_deref(), Some("8"));
        // Only the listener is left. Passed state is removed from the store once it was taken.
        eventually("the store has removed it", || service.get("NFileDescriptorStore") == "1");
        // A stop is not a restart: connections and values are lost.
        let mut client = Client::connect();
        assert_eq!(client.ask("count").as_deref(), Some("8"));
        service.succeed("stop");
        assert_eq!(client.ask("count"), None);
        service.start();
        assert_eq!(Client::connect().ask("count").as_deref(), Some("0"));
        service.succeed("stop");
        assert_eq!(machine.complaints(), Vec::<String>::new());
    });
}

#[test]
#[ignore = "needs root, cgroup2, overlayfs and apt"]
fn what_is_not_whole_is_not_used() {
    under_systemd("passed::what_is_not_whole_is_not_used", |machine| {
        // If the store is too small, the stop stores nothing, and logs the size that it needs.
        let service = kv(&machine, 3);
        let mut clients: Vec<_> = (0..3).map(|_| Client::connect()).collect();
        assert_eq!(clients[0].ask("set a 1").as_deref(), Some("ok"));
        service.succeed("restart");
        assert_eq!(Client::connect().ask("count").as_deref(), Some("0"));
        assert_eq!(clients[0].ask("count"), None, "the connection ended with the process");
        // If the store has become too small in the meantime, systemd drops the descriptors that do not fit, without an
        // error.
        machine.set("kv.service", "store", "[Service]\nFileDescriptorStoreMax=64\n");
        service.succeed("restart");
        let mut clients: Vec<_> = (0..3).map(|_| Client::connect()).collect();
        assert!(clients.iter_mut().all(|client| client.ask("set a 1").as_deref() == Some("ok")));
        machine.set("kv.service", "store", "[Service]\nFileDescriptorStoreMax=4\n");
        service.succeed("restart");
        assert_eq!(Client::connect().ask("count").as_deref(), Some("0"));
        assert!(clients.iter_mut().all(|client| client.ask("count").is_none()));
        eventually("the rest is removed", || service.get("NFileDescriptorStore") == "1");
        service.succeed("stop");
    });
}
