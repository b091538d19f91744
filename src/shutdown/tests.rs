//! The shutdown handle with real sockets and threads.

use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use super::*;

/// Far longer than anything here takes, even on a loaded machine.
const LONG: Duration = Duration::from_secs(30);

fn accepting() -> Shutdown {
    let shutdown = Shutdown::new(Duration::ZERO).unwrap();
    shutdown.set(State::Accepting);
    shutdown
}

fn listener() -> TcpListener {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    listener.set_nonblocking(true).unwrap();
    listener
}

#[test]
fn each_drain_returns_by_its_own_deadline() {
    let shutdown = accepting();
    let guard = shutdown.guard();
    shutdown.set(State::Stopped);
    let (tell, told) = mpsc::channel();
    let long = thread::spawn({
        let shutdown = shutdown.clone();
        move || {
            tell.send(()).unwrap();
            shutdown.drain(LONG)
        }
    });
    told.recv().unwrap();
    let started = Instant::now();
    assert_eq!(shutdown.drain(Duration::from_millis(100)), 1);
    assert!(started.elapsed() < LONG / 2);
    drop(guard);
    assert_eq!(long.join().unwrap(), 0);
}

#[test]
fn every_drain_sees_the_end() {
    for _ in 0..50 {
        let shutdown = accepting();
        let guards: Vec<_> = (0..4).map(|_| shutdown.guard()).collect();
        let drains: Vec<_> = (0..4)
            .map(|_| {
                let shutdown = shutdown.clone();
                thread::spawn(move || (shutdown.drain(LONG), Instant::now()))
            })
            .collect();
        shutdown.set(State::Stopped);
        for guard in guards {
            thread::spawn(move || drop(guard));
        }
        let started = Instant::now();
        for drain in drains {
            let (left, at) = drain.join().unwrap();
            assert_eq!(left, 0);
            assert!(at - started < LONG / 2);
        }
    }
}

#[test]
fn a_drain_may_begin_before_accepting_is_over() {
    let shutdown = accepting();
    let early = thread::spawn({
        let shutdown = shutdown.clone();
        move || shutdown.drain(LONG)
    });
    let guard = shutdown.guard();
    assert_eq!(shutdown.drain(Duration::from_millis(50)), 1);
    drop(guard);
    assert_eq!(shutdown.drain(Duration::from_millis(50)), 0);
    assert!(!early.is_finished(), "nothing is over");
    shutdown.set(State::HandedOver);
    assert_eq!(early.join().unwrap(), 0);
}

#[derive(Debug)]
struct Signal(crate::sys::flag::Flag);

impl EndSignal for Signal {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn read(&self) -> End {
        End::Within(Duration::ZERO)
    }
}

#[test]
fn a_drain_that_began_before_the_upgrade_can_be_ended_by_the_successor() {
    let shutdown = accepting();
    let _guard = shutdown.guard();
    let early = thread::spawn({
        let shutdown = shutdown.clone();
        move || shutdown.drain(LONG)
    });
    let signal = Arc::new(Signal(crate::sys::flag::Flag::new(false).unwrap()));
    shutdown.drains().add_end_signal(signal.clone());
    shutdown.set(State::HandedOver);
    signal.0.raise();
    assert_eq!(early.join().unwrap(), 1);
}

/// Everything that was queued at a stop has been served when the drain returns, even if each connection takes time and
/// its guard is created late.
#[test]
fn a_drain_waits_for_a_loop_of_accept_calls() {
    let (shutdown, listener) = (accepting(), listener());
    let address = listener.local_addr().unwrap();
    let served = Arc::new(AtomicUsize::new(0));
    let (tell, told) = mpsc::channel();
    let accepting = thread::spawn({
        let (shutdown, served) = (shutdown.clone(), served.clone());
        move || {
            while let Some(Ok(_stream)) = shutdown.accept(&listener) {
                tell.send(()).unwrap();
                thread::sleep(Duration::from_millis(5));
                let _guard = shutdown.guard();
                served.fetch_add(1, Ordering::SeqCst);
            }
        }
    });
    let clients: Vec<_> = (0..20).map(|_| TcpStream::connect(address).unwrap()).collect();
    told.recv().unwrap();
    shutdown.set(State::Stopped);
    assert_eq!(shutdown.drain(LONG), 0);
    assert_eq!(served.load(Ordering::SeqCst), clients.len());
    accepting.join().unwrap();
}

#[test]
fn a_drain_waits_for_a_loop_of_recv_from_calls() {
    let shutdown = accepting();
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    socket.set_nonblocking(true).unwrap();
    let (address, client) = (socket.local_addr().unwrap(), UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap());
    let served = Arc::new(AtomicUsize::new(0));
    let (tell, told) = mpsc::channel();
    let receiving = thread::spawn({
        let (shutdown, served) = (shutdown.clone(), served.clone());
        move || {
            while let Some(Ok(_)) = shutdown.recv_from(&socket, &mut [0; 8]) {
                tell.send(()).unwrap();
                thread::sleep(Duration::from_millis(5));
                served.fetch_add(1, Ordering::SeqCst);
            }
        }
    });
    for _ in 0..10 {
        client.send_to(b"x", address).unwrap();
    }
    told.recv().unwrap();
    shutdown.set(State::Stopped);
    assert_eq!(shutdown.drain(LONG), 0);
    assert_eq!(served.load(Ordering::SeqCst), 10);
    receiving.join().unwrap();
}

#[test]
fn a_thread_that_drains_does_not_wait_for_itself() {
    let (shutdown, listener) = (accepting(), listener());
    let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    shutdown.accept(&listener).unwrap().unwrap();
    shutdown.set(State::HandedOver);
    assert_eq!(shutdown.drain(LONG), 0);
}

/// Two generations share a listener. A thread of this one is woken for a connection, and paused before it accepts.
#[test]
fn a_paused_thread_passes_its_wakeup_on() {
    let path = std::env::temp_dir().join(format!("ecdysis-pass-on-{}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let unix = UnixListener::bind(&path).unwrap();
    unix.set_nonblocking(true).unwrap();
    let tcp = listener();
    let address = tcp.local_addr().unwrap();
    passes_on(tcp, || drop(TcpStream::connect(address).unwrap()));
    passes_on(unix, || drop(UnixStream::connect(&path).unwrap()));
    std::fs::remove_file(&path).unwrap();
}

fn passes_on<L: Accept + Send + Sync + 'static>(listener: L, connect: impl FnOnce()) {
    let listener = Arc::new(listener);
    let (old, new) = (accepting(), accepting());
    // The kernel wakes the thread that waited first.
    let old_thread = accepting_thread(&old, &listener).0;
    let (new_thread, accepted) = accepting_thread(&new, &listener);
    // No thread has been woken for the pause yet.
    old.0.gate.state.store(State::Paused as u8, Ordering::SeqCst);
    connect();
    accepted.recv_timeout(LONG).expect("the connection waits for a thread that is paused");
    for shutdown in [&old, &new] {
        shutdown.set(State::HandedOver);
    }
    for thread in [old_thread, new_thread] {
        thread.join().unwrap();
    }
}

/// Starts a thread that sleeps while it waits for a connection.
fn accepting_thread<L: Accept + Send + Sync + 'static>(
    shutdown: &Shutdown,
    listener: &Arc<L>,
) -> (thread::JoinHandle<()>, mpsc::Receiver<()>) {
    let (shutdown, listener) = (shutdown.clone(), listener.clone());
    let (tell, told) = mpsc::channel();
    let (tell_accepted, accepted) = mpsc::channel();
    let thread = thread::spawn(move || {
        tell.send(std::fs::read_link("/proc/thread-self").unwrap()).unwrap();
        for _ in shutdown.incoming(&*listener).flatten() {
            let _ = tell_accepted.send(());
        }
    });
    let stat = std::path::Path::new("/proc").join(told.recv().unwrap()).join("stat");
    let started = Instant::now();
    while !std::fs::read_to_string(&stat).unwrap().contains(") S ") {
        assert!(started.elapsed() < LONG);
        thread::yield_now();
    }
    (thread, accepted)
}
