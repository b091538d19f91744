//! Gives a command to a server through its control socket, and exits with the outcome: fit for `ExecReload=`.
//!
//!     ctl /run/app/control upgrade        # upgraded pid=812 generation=2 ms=2.1
//!
//! Exits with 0 if the server has done it, 1 if it says otherwise, 2 if it cannot be asked.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let [socket, command] = &arguments[..] else {
        eprintln!("usage: ctl SOCKET upgrade|stop|partial-stop|status");
        return ExitCode::from(2);
    };
    let command = command.to_string_lossy();
    match ask(socket, &command) {
        Ok(answer) => {
            println!("{answer}");
            let refused = ["failed", "busy", "unknown"].iter().any(|word| answer.starts_with(word));
            // A server that was told to stop during an upgrade has not been upgraded.
            let stopping = command == "upgrade" && answer.starts_with("stopping");
            ExitCode::from(u8::from(refused || stopping || answer.is_empty()))
        }
        Err(error) => {
            eprintln!("ctl: {}: {error}", socket.to_string_lossy());
            ExitCode::from(2)
        }
    }
}

/// One command, one line back. The server answers, and closes, when it is over, which may take as long as its deadlines
/// allow: after `stop` that is its end.
fn ask(socket: &std::ffi::OsStr, command: &str) -> std::io::Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    writeln!(stream, "{command}")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.trim_end().to_owned())
}
