//! A program migrates from version 1.1.1 unchanged: it compiles with both versions (`src/program.rs`), and behaves the
//! same.

#[path = "../../support/mod.rs"]
mod support;

use std::fs;
use std::net::{TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;

use rustix::net::{connect, recv, send, socket, AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketType};
use rustix::process::Signal;
use support::{field, generation, tempdir, wait_exit, Load, Server, TempDir, DEADLINE};

/// Returns every line that shows the behavior of a version, without the numbers that differ from run to run.
fn told(server: &Server) -> Vec<String> {
    let telling = |line: &&String| ["systemd ", "passed ", "greeted ", "ended "].iter().any(|w| line.starts_with(w));
    let mut told: Vec<_> =
        server.said().iter().filter(telling).map(|line| line.split(" pid=").next().unwrap().to_owned()).collect();
    // Two generations write at the same time.
    told.sort();
    told
}

struct Program {
    server: Server,
    dir: TempDir,
    port: u16,
}

impl Program {
    fn start(program: &str, wrap: impl FnOnce(&str, &Path) -> Command) -> Self {
        let dir = tempdir();
        let probe = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = probe.local_addr().unwrap().port();
        drop(probe);
        let mut command = wrap(program, dir.path());
        command.arg(dir.path()).arg(port.to_string());
        Self { server: Server::serving(command), dir, port }
    }

    fn unix(&self, name: &str) -> String {
        format!("unix:{}", self.dir.path().join(name).display())
    }

    /// Checks that all listeners belong to this generation.
    fn is(&mut self, gen: u64) {
        for address in [format!("127.0.0.1:{}", self.port), format!("127.0.0.2:{}", self.port), self.unix("unix")] {
            assert_eq!(generation(&address), gen, "{address}");
        }
        let records = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
        connect(&records, &SocketAddrUnix::new(self.dir.path().join("records")).unwrap()).unwrap();
        send(&records, b"who", SendFlags::empty()).unwrap();
        let mut answer = [0; 64];
        let (_, length) = recv(&records, &mut answer[..], RecvFlags::empty()).unwrap();
        assert_eq!(field::<u64>(std::str::from_utf8(&answer[..length]).unwrap(), "gen"), gen);

        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.set_read_timeout(Some(DEADLINE)).unwrap();
        client.send_to(b"who", ("127.0.0.2", self.port)).unwrap();
        let length = client.recv(&mut answer).unwrap();
        assert_eq!(field::<u64>(std::str::from_utf8(&answer[..length]).unwrap(), "gen"), gen);
        client.send_to(b"datagram", ("127.0.0.1", self.port)).unwrap();
        assert_eq!(field::<u32>(&self.server.wait("heard datagram"), "pid"), self.server.pid());
    }

    fn has(&self, name: &str) -> bool {
        self.dir.path().join(name).exists()
    }
}

fn plain(program: &str, _: &Path) -> Command {
    let mut command = Command::new(program);
    command.env_remove("NOTIFY_SOCKET");
    command
}

const BOTH: [&str; 2] = [env!("CARGO_BIN_EXE_old"), env!("CARGO_BIN_EXE_new")];

#[test]
fn upgrades_and_stops() {
    for by_socket in [false, true] {
        let both = BOTH.map(|program| {
            let mut program = Program::start(program, plain);
            program.is(1);
            let old = program.server.pid();
            let mut asked = None;
            if by_socket {
                asked = Some(UnixStream::connect(program.dir.path().join("upgrade")).unwrap());
            } else {
                program.server.signal(Signal::HUP);
            }
            program.server.wait("serving gen=2");
            program.server.wait("ended upgrade");
            drop(asked);
            wait_exit(old);
            let pid = fs::read_to_string(program.dir.path().join("pid")).unwrap();
            assert_eq!(pid.trim().parse(), Ok(program.server.pid()));
            program.is(2);
            if by_socket {
                UnixStream::connect(program.dir.path().join("stop")).unwrap();
            } else {
                program.server.signal(Signal::TERM);
            }
            program.server.wait("ended full stop");
            program.server.wait_all_ended();
            assert!(!program.has("upgrade") && !program.has("stop") && !program.has("partial"));
            told(&program.server)
        });
        assert_eq!(both[0], both[1]);
    }
}

#[test]
fn a_partial_stop_takes_the_triggers_along_and_nothing_else() {
    for by_socket in [false, true] {
        let both = BOTH.map(|program| {
            let mut program = Program::start(program, plain);
            if by_socket {
                UnixStream::connect(program.dir.path().join("partial")).unwrap();
            } else {
                program.server.signal(Signal::USR1);
            }
            program.server.wait("ended partial stop");
            program.server.wait_all_ended();
            assert!(!program.has("upgrade") && !program.has("stop") && !program.has("partial"));
            assert!(program.has("unix") && program.has("records") && program.has("pid"));
            told(&program.server)
        });
        assert_eq!(both[0], both[1]);
    }
}

#[test]
fn under_a_service_manager() {
    let both = BOTH.map(|program| {
        let mut manager = None;
        let mut program = Program::start(program, |program, dir| {
            let (notify, passed) = (dir.join("notify"), UnixListener::bind(dir.join("passed")).unwrap());
            manager = Some(UnixDatagram::bind(&notify).unwrap());
            // Without LISTEN_FDS, which 1.1.1 does not read, and with a name that no unit has chosen.
            let script = "exec 3>&1 4>&1 1>/dev/null; LISTEN_PID=$$ LISTEN_FDNAMES=web:unknown exec \"$0\" \"$@\"";
            let mut shell = Command::new("sh");
            shell.args(["-c", script, program]).env("NOTIFY_SOCKET", &notify).stdout(OwnedFd::from(passed));
            shell
        });
        let manager = manager.unwrap();
        manager.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut said = String::new();
        let mut hear = |what: &str| {
            said.clear();
            while !said.contains(what) {
                let mut message = [0; 4096];
                let length = manager.recv(&mut message).unwrap_or_else(|e| panic!("{what}: {e}; said {said:?}"));
                said = String::from_utf8_lossy(&message[..length]).into_owned();
            }
        };
        hear("READY=1");
        assert_eq!(generation(&program.unix("passed")), 1);
        program.server.signal(Signal::HUP);
        hear("RELOADING=1");
        hear("READY=1");
        program.server.wait("ended upgrade");
        assert_eq!(generation(&program.unix("passed")), 2);
        program.server.signal(Signal::USR1);
        for message in ["MAINPID=", "RELOADING=1", "EXTEND_TIMEOUT_USEC=1000000", "STATUS=so far", "STOPPING=1"] {
            hear(message);
        }
        program.server.wait("ended partial stop with systemd");
        program.server.wait_all_ended();
        assert!(program.has("passed"));
        told(&program.server)
    });
    assert_eq!(both[0], both[1]);
}

/// A running process of 1.1.1 is upgraded to a program with this version, which is then upgraded to itself.
#[test]
fn a_live_process_of_1_1_1_hands_over_to_this_version() {
    let dir = tempdir();
    let place = dir.path().join("program");
    let install = |program: &str| {
        let new = dir.path().join("new");
        assert!(Command::new("cp").arg(program).arg(&new).status().unwrap().success());
        fs::rename(new, &place).unwrap();
    };
    install(BOTH[0]);
    let mut program = Program::start(place.to_str().unwrap(), plain);
    program.is(1);
    install(BOTH[1]);
    let load = Load::on(&format!("127.0.0.1:{}", program.port), 2);
    for by_1_1_1 in [true, false] {
        let old = program.server.pid();
        program.server.signal(Signal::HUP);
        program.server.wait("serving gen=2"); // the program prints 2 in every child
        program.server.wait("ended upgrade");
        wait_exit(old);
        program.is(2);
        let environment = fs::read(format!("/proc/{}/environ", program.server.pid())).unwrap();
        let inherits = |text: &[u8]| environment.windows(text.len()).any(|part| part == text);
        assert_eq!(inherits(b"ECDYSIS_RUST_UPGRADE=yes"), by_1_1_1);
        assert_eq!(inherits(b"ECDYSIS_HANDOVER="), !by_1_1_1);
    }
    load.stop().assert_none_failed();
    program.server.signal(Signal::TERM);
    program.server.wait("ended full stop");
    program.server.wait_all_ended();
}
