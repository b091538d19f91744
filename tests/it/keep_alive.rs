//! No client notices an upgrade. Tests new, busy and idle connections; over TCP and Unix sockets; in an upgrade,
//! a takeover and a stop; with and without a probation.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use rustix::process::Signal;

use crate::support::*;

#[derive(Clone, Copy, Debug, PartialEq)]
enum How {
    Upgrade,
    Takeover,
    Stop,
}

/// A client with a persistent connection.
struct Client(BufReader<Box<dyn Conn>>);

impl Client {
    fn connect(addr: &str) -> io::Result<Self> {
        Ok(Self(BufReader::new(connect(addr)?)))
    }

    /// Returns whether the answer announces the end of the connection.
    fn ask(&mut self) -> io::Result<bool> {
        self.0.get_mut().write_all(b"keep\n")?;
        let mut answer = String::new();
        self.0.read_line(&mut answer)?;
        match answer.strip_suffix('\n') {
            Some(answer) if answer.contains("gen=") => Ok(answer.ends_with(" last")),
            _ => Err(ErrorKind::UnexpectedEof.into()),
        }
    }

    /// Waits until the server closes the connection. Any end but a regular one is an error.
    fn ends(mut self) -> io::Result<()> {
        match self.0.read(&mut [0])? {
            0 => Ok(()),
            _ => Err(ErrorKind::InvalidData.into()),
        }
    }
}

/// After the service has stopped, a *new* connection may fail: it is refused, or reset if the kernel completed its
/// handshake just before the listener was closed.
fn refused(error: &io::Error) -> bool {
    use ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotFound};
    matches!(error.kind(), ConnectionRefused | ConnectionReset | BrokenPipe | NotFound)
}

fn nobody_notices(listen: &str, how: How, probation: &str) {
    let case = format!("{listen}, {how:?}, probation {probation}");
    let dir = tempdir();
    let [path, takeover] = ["socket", "takeover"].map(|name| dir.path().join(name).display().to_string());
    let start = |take_over: bool| {
        let mut command = Command::new(example("whoami"));
        command.args(["--keep-alive", "--probation", probation, "--takeover-socket", &takeover]);
        command.args(["--listen", &listen.replace("PATH", &path)]);
        command.args(take_over.then_some(["--take-over", &takeover]).iter().flatten());
        Server::serving(command)
    };
    let mut server = start(false);
    let (addr, stopped) = (server.addr(), AtomicBool::new(false));
    let requests = AtomicU64::new(0);

    // One client sends a request and then nothing; the other sends nothing at all.
    let mut idle = Client::connect(&addr).unwrap();
    assert!(!idle.ask().unwrap());
    let unused = Client::connect(&addr).unwrap();

    let busy = || -> io::Result<()> {
        while !stopped.load(Ordering::Relaxed) {
            let first = Client::connect(&addr).and_then(|mut client| Ok((client.ask()?, client)));
            let (mut last, mut client) = match first {
                Err(e) if how == How::Stop && refused(&e) => return Ok(()),
                first => first?,
            };
            while !last && !stopped.load(Ordering::Relaxed) {
                requests.fetch_add(1, Ordering::Relaxed);
                last = client.ask()?;
            }
            if last {
                client.ends()?;
            }
        }
        Ok(())
    };
    let new = || -> io::Result<()> {
        while !stopped.load(Ordering::Relaxed) {
            match ask(&addr) {
                Err(e) if how == How::Stop && refused(&e) => return Ok(()),
                answer => answer?,
            };
            requests.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    };
    thread::scope(|scope| {
        let _stop = SetOnDrop(&stopped);
        let clients: Vec<_> = (0..3).map(|_| scope.spawn(busy)).chain((0..2).map(|_| scope.spawn(new))).collect();
        let under_load = || requests.load(Ordering::Relaxed);
        let before = under_load();
        eventually("there is load", || under_load() > before + 50);
        let mut second = None;
        match how {
            How::Upgrade => {
                for _ in 0..2 {
                    let old = server.pid();
                    server.upgrade();
                    wait_exit(old);
                }
            }
            How::Takeover => {
                let old = server.pid();
                second = Some(start(true));
                wait_exit(old);
            }
            How::Stop => {
                server.signal(Signal::TERM);
                server.wait_all_ended();
            }
        }
        if how != How::Stop {
            let before = under_load();
            eventually("it is served", || under_load() > before + 50);
        }
        stopped.store(true, Ordering::Relaxed);
        for client in clients {
            client.join().unwrap().unwrap_or_else(|error| panic!("{case}: a client lost a request: {error}"));
        }
        idle.ends().unwrap_or_else(|error| panic!("{case}: an idle connection was not closed normally: {error}"));
        unused.ends().unwrap_or_else(|error| panic!("{case}: an unused connection was not closed normally: {error}"));
        drop(second);
    });
}

macro_rules! cases {
    ($($name:ident: $listen:expr, $how:ident, $probation:expr;)*) => {
        $(#[test]
        fn $name() {
            nobody_notices($listen, How::$how, $probation);
        })*
    };
}

cases! {
    upgrade_over_tcp: "127.0.0.1:0", Upgrade, "100";
    upgrade_over_unix: "unix:PATH", Upgrade, "100";
    upgrade_without_probation_over_tcp: "127.0.0.1:0", Upgrade, "0";
    upgrade_without_probation_over_unix: "unix:PATH", Upgrade, "0";
    takeover_over_tcp: "127.0.0.1:0", Takeover, "100";
    takeover_over_unix: "unix:PATH", Takeover, "100";
    takeover_without_probation_over_tcp: "127.0.0.1:0", Takeover, "0";
    stop_over_tcp: "127.0.0.1:0", Stop, "100";
    stop_over_unix: "unix:PATH", Stop, "100";
}
