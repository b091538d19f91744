//! The counterpart of `whoami` on Tokio: a server that answers with its generation. Its protocol and log are those of
//! `whoami`, so that either can be the next generation of the other.
//!
//!     cargo run --features tokio --example tokio_whoami -- --listen 127.0.0.1:7000
//!     echo | nc 127.0.0.1 7000            # in a second terminal: gen=1 pid=4711
//!     kill -HUP 4711
//!
//!     tokio_whoami --listen ADDR...       ip:port, unix:PATH, unix:@name, seqpacket:PATH, udp:ip:port,
//!                                         stoppable-udp:ip:port
//!       --workers N                       threads of the runtime; 0, the default, is a current-thread runtime
//!       --tasks N                         tasks that accept from each stream; 0, the default, is one that iterates
//!       --systemd                         notifies the service manager, and takes its sockets: --listen unit:NAME=PATH;
//!                                         needs feature systemd
//!       --keep-passed                     a stop stores what is passed with the service manager
//!       --gate PATH                       before ready, waits for a connection to this socket and writes to it how many
//!                                         connections were accepted
//!       --forget-exit                     drops the exit future, and waits for the shutdown handle instead
//!       --keep                            StopOnShutdown::No
//!       --hold --drain --misbehave --exec --probation --ready-timeout --control-socket --pid-file    as in whoami
//!       --takeover-socket PATH            lets a process with --take-over PATH take over

#[path = "../../examples/support/mod.rs"]
mod support;

use ecdysis::tokio_ecdysis::{
    Listener, SignalKind, StopOnShutdown, Stoppable, StoppableStream, TokioEcdysisBuilder, UdpStream,
    UnixSeqpacketListenerStream,
};
use ecdysis::{Event, Shutdown};
use futures::{Stream, StreamExt};
use std::error::Error;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::{self, ExitCode};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{UdpSocket, UnixListener};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

static ACCEPTED: AtomicUsize = AtomicUsize::new(0);

fn main() -> ExitCode {
    support::help(include_str!("tokio_whoami.rs"));
    let run = || {
        let mut choices = ecdysis::Ecdysis::builder();
        let options = Options::parse(&mut choices)?;
        let mut runtime = match options.workers {
            0 => tokio::runtime::Builder::new_current_thread(),
            _ => tokio::runtime::Builder::new_multi_thread(),
        };
        // A runtime without timers, because the library does not need them.
        runtime.worker_threads(options.workers.max(1)).enable_io().build()?.block_on(serve(options, choices))
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(format!("tokio_whoami: {}", chain(&*error)));
            ExitCode::FAILURE
        }
    }
}

async fn serve(options: Options, mut choices: ecdysis::Builder) -> Result<()> {
    let mut builder = TokioEcdysisBuilder::from_builder(choices.on_event(report))?;
    builder.upgrade_on_signal(SignalKind::hangup())?;
    builder.stop_on_signal(SignalKind::terminate())?;
    builder.stop_on_signal(SignalKind::interrupt())?;
    builder.partial_stop_on_signal(SignalKind::user_defined2())?;
    #[cfg(feature = "systemd")]
    if options.systemd {
        builder.enable_systemd_notifications()?;
        if let Err(why) = builder.read_systemd_sockets() {
            say(format!("{why}"));
        }
        builder.systemd_keep_passed(options.keep_passed);
    }
    if let Some(path) = &options.pid_file {
        builder.set_pid_file(path);
    }
    if let Some(path) = &options.takeover {
        builder.takeover_on_socket(path)?;
    }
    if let Some(path) = &options.control {
        builder.control_on_socket(path)?;
    }

    let (gen, pid) = (builder.generation(), process::id());
    for address in &options.listen {
        let real = listen(&builder, address, &options).await?;
        say(format!("listening {real} gen={gen} pid={pid}"));
    }
    // Each generation greets the previous one, and reports the greeting that it receives.
    let (to_parent, to_child) = builder.unix_datagram_pair("chain");
    if let Some(parent) = to_parent {
        parent?.send(format!("hello from gen={gen}").as_bytes()).await?;
    }
    let to_child = to_child?;
    tokio::spawn(async move {
        let mut greeting = [0; 100];
        while let Ok(length) = to_child.recv(&mut greeting).await {
            say(format!("heard {}", String::from_utf8_lossy(&greeting[..length])));
        }
    });
    if let Some(path) = &options.gate {
        let (mut stream, _) = UnixListener::bind(path)?.accept().await?;
        stream.write_all(format!("accepted={}\n", ACCEPTED.load(Ordering::SeqCst)).as_bytes()).await?;
    }
    let after_ready = match (builder.is_child(), &options.misbehave) {
        (true, Some(file)) => std::fs::read_to_string(file).unwrap_or_default(),
        _ => String::new(),
    };
    for word in after_ready.split_whitespace() {
        match word.split_once('=').unwrap_or((word, "")) {
            ("exit", code) => process::exit(code.parse()?),
            ("refuse", why) => return Err(builder.refuse(why).into()),
            ("sleep", ms) => {
                // The runtime keeps running, so anything that could accept before `ready` would do so.
                let time = Duration::from_millis(ms.parse()?);
                tokio::task::spawn_blocking(move || std::thread::sleep(time)).await?;
            }
            ("stop-self", _) => {
                rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::STOP)?
            }
            ("die-after-ready", ms) => {
                let time = Duration::from_millis(ms.parse()?);
                // The test chose when it dies.
                std::thread::spawn(move || {
                    std::thread::sleep(time);
                    process::abort();
                });
            }
            _ => return Err(format!("--misbehave: what is {word}?").into()),
        }
    }

    let (ecdysis, exit) = builder.ready()?;
    say(format!("serving gen={gen} pid={pid}"));
    let how = if options.forget_exit {
        drop(exit);
        ecdysis.over().await;
        "forgotten".to_string()
    } else {
        let (mode, reason) = exit.await?;
        format!("{mode:?} ({reason:?})")
    };
    say(format!("over gen={gen} pid={pid} {how}"));
    #[cfg(feature = "systemd")]
    ecdysis.extend_systemd_timeouts(options.drain).await?;
    let left = ecdysis.drain(options.drain).await?;
    if options.keep {
        // Only a signal ends the ones that never stop.
        say(format!("keeps on gen={gen} pid={pid}"));
        std::future::pending::<()>().await;
    }
    let accepted = ACCEPTED.load(Ordering::SeqCst);
    say(format!("ended gen={gen} pid={pid} left={left} accepted={accepted} {how}"));
    Ok(())
}

/// Serves one address. The tasks run before `ready`, and accept nothing until then.
async fn listen(builder: &TokioEcdysisBuilder, address: &str, options: &Options) -> Result<String> {
    let stop = if options.keep { StopOnShutdown::No } else { StopOnShutdown::Yes };
    let shutdown = builder.shutdown();
    let answer = format!("gen={} pid={}", builder.generation(), process::id());
    if let Some(path) = address.strip_prefix("unix:") {
        let stream = builder.listen_unix(stop, path)?;
        serve_each(stream, shutdown, options, answer);
        Ok(address.into())
    } else if let Some(unit) = address.strip_prefix("unit:") {
        #[cfg(feature = "systemd")]
        if let Some((name, path)) = unit.split_once('=') {
            let stream = builder.systemd_listen_unix(stop, name.into(), path).await?;
            serve_each(stream, shutdown, options, answer);
            return Ok(format!("unix:{path}"));
        }
        Err(format!("cannot listen on unit {unit}").into())
    } else if let Some(path) = address.strip_prefix("seqpacket:") {
        let stream = builder.listen_unix_seqpacket(stop, path)?;
        tokio::spawn(records(stream, shutdown, answer));
        Ok(address.into())
    } else if let Some(address) = address.strip_prefix("udp:") {
        let stream = builder.build_stream_udp(stop, address.parse()?, |socket, address| {
            socket.bind(&address.into())?;
            Ok(socket.into())
        })?;
        let real = stream.get_ref().ok_or("over")?.local_addr()?;
        tokio::spawn(datagrams(stream, answer));
        Ok(format!("udp:{real}"))
    } else if let Some(address) = address.strip_prefix("stoppable-udp:") {
        let socket = builder.build_stoppable_socket_udp(stop, address.parse()?, |socket, address| {
            socket.bind(&address.into())?;
            Ok(socket.into())
        })?;
        let real = socket.as_unstoppable_ref().local_addr()?;
        tokio::spawn(stoppable(socket, shutdown, answer));
        Ok(format!("stoppable-udp:{real}"))
    } else {
        let stream = builder.listen_tcp(stop, address.parse()?)?;
        let real = stream.get_ref().ok_or("over")?.local_addr()?;
        serve_each(stream, shutdown, options, answer);
        Ok(real.to_string())
    }
}

/// Spawns a task per connection, with a guard in each, so that the drain waits for it.
fn serve_each<S, C, A>(mut connections: StoppableStream<S>, shutdown: Shutdown, options: &Options, answer: String)
where
    S: Listener<Accepted = (C, A)> + Stream<Item = io::Result<C>> + Send + Sync + 'static,
    C: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    A: Send + 'static,
{
    let (hold, answer) = (options.hold, Arc::<str>::from(answer));
    let serve = move |connection: C| {
        ACCEPTED.fetch_add(1, Ordering::SeqCst);
        let (guard, answer) = (shutdown.guard(), answer.clone());
        tokio::spawn(async move {
            let _ = reply(connection, hold, &answer).await;
            drop(guard);
        });
    };
    if options.tasks == 0 {
        tokio::spawn(async move {
            while let Some(Ok(connection)) = connections.next().await {
                serve(connection);
            }
        });
        return;
    }
    let connections = Arc::new(connections);
    for _ in 0..options.tasks {
        let (connections, serve) = (connections.clone(), serve.clone());
        tokio::spawn(async move {
            while let Some(Ok((connection, _peer))) = connections.accept().await {
                serve(connection);
            }
        });
    }
}

async fn reply(connection: impl AsyncRead + AsyncWrite + Unpin, hold: bool, answer: &str) -> io::Result<()> {
    let mut connection = BufReader::new(connection);
    while connection.read_until(b'\n', &mut Vec::new()).await? > 0 {
        connection.write_all(format!("{answer}\n").as_bytes()).await?;
        if !hold {
            break;
        }
    }
    Ok(())
}

async fn records(mut connections: StoppableStream<UnixSeqpacketListenerStream>, shutdown: Shutdown, answer: String) {
    while let Some(Ok(connection)) = connections.next().await {
        let (guard, answer) = (shutdown.guard(), answer.clone());
        tokio::spawn(async move {
            let mut record = [0; 1024];
            while let Ok(length @ 1..) = connection.recv(&mut record).await {
                let _ = connection.send(&[answer.as_bytes(), b" ", &record[..length]].concat()).await;
            }
            drop(guard);
        });
    }
}

async fn datagrams(mut datagrams: StoppableStream<UdpStream>, answer: String) {
    while let Some(Ok((datagram, peer))) = datagrams.next().await {
        ACCEPTED.fetch_add(1, Ordering::SeqCst);
        let Some(socket) = datagrams.get_ref() else { break };
        let _ = socket.send_to(&[answer.as_bytes(), b" ", &datagram].concat(), peer).await;
    }
}

async fn stoppable(socket: Stoppable<UdpSocket>, shutdown: Shutdown, answer: String) {
    let _guard = shutdown.guard();
    let mut datagram = [0; 65536];
    while let Some(received) = socket.until_stopped(|socket| socket.recv_from(&mut datagram)).await {
        let Ok((length, peer)) = received else { continue };
        let answer = [answer.as_bytes(), b" ", &datagram[..length]].concat();
        let _ = socket.as_unstoppable_ref().send_to(&answer, peer).await;
    }
}

#[derive(Default)]
struct Options {
    listen: Vec<String>,
    workers: usize,
    tasks: usize,
    gate: Option<PathBuf>,
    forget_exit: bool,
    keep: bool,
    hold: bool,
    systemd: bool,
    keep_passed: bool,
    drain: Duration,
    misbehave: Option<PathBuf>,
    control: Option<PathBuf>,
    takeover: Option<PathBuf>,
    pid_file: Option<PathBuf>,
}

impl Options {
    fn parse(choices: &mut ecdysis::Builder) -> Result<Options> {
        use lexopt::prelude::*;
        let mut options = Options { drain: Duration::from_secs(10), ..Options::default() };
        let mut args = lexopt::Parser::from_env();
        let ms = |value: std::ffi::OsString| value.parse().map(Duration::from_millis);
        while let Some(arg) = args.next()? {
            match arg {
                Long("listen") => options.listen.push(args.value()?.string()?),
                Long("tasks") => options.tasks = args.value()?.parse()?,
                Long("workers") => options.workers = args.value()?.parse()?,
                Long("gate") => options.gate = Some(args.value()?.into()),
                Long("forget-exit") => options.forget_exit = true,
                Long("keep") => options.keep = true,
                Long("hold") => options.hold = true,
                Long("keep-passed") => options.keep_passed = true,
                Long("systemd") => options.systemd = cfg!(feature = "systemd"),
                Long("drain") => {
                    options.drain = args.value()?.parse_with(|s| s.parse().map(Duration::from_secs_f64))?
                }
                Long("misbehave") => options.misbehave = Some(args.value()?.into()),
                Long("control-socket") => options.control = Some(args.value()?.into()),
                Long("takeover-socket") => options.takeover = Some(args.value()?.into()),
                Long("take-over") => drop(choices.take_over(args.value()?)),
                Long("pid-file") => options.pid_file = Some(args.value()?.into()),
                Long("exec") => drop(choices.exec(args.value()?)),
                Long("ready-timeout") => drop(choices.ready_timeout(ms(args.value()?)?)),
                Long("probation") => drop(choices.probation(ms(args.value()?)?)),
                other => return Err(other.unexpected().into()),
            }
        }
        if options.listen.is_empty() {
            return Err("nothing to do: give --listen ADDR at least once".into());
        }
        Ok(options)
    }
}

fn report(event: &Event) {
    match event {
        Event::Upgrading => say(format!("upgrading pid={}", process::id())),
        Event::Committed(u) => {
            let ms = u.commit.as_secs_f64() * 1e3;
            say(format!("committed pid={} gen={} ms={ms:.3}", u.pid, u.generation));
        }
        Event::Upgraded(u) => {
            let ms = u.commit.as_secs_f64() * 1e3;
            say(format!("upgrade ok pid={} gen={} ms={ms:.3}", u.pid, u.generation));
        }
        Event::UpgradeFailed { error, .. } => say(format!("upgrade failed: {}", chain(error))),
        _ => {}
    }
}

/// Writes each line with one call, so that the lines of several generations never mix. A failure cannot be reported.
fn say(line: String) {
    let _ = io::stderr().write_all(format!("{line}\n").as_bytes());
}

fn chain(error: &dyn Error) -> String {
    let (mut all, mut next) = (error.to_string(), error.source());
    while let Some(error) = next {
        all += &format!(": {error}");
        next = error.source();
    }
    all
}
