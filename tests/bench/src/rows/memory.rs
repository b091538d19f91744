//! The memory of a listener and of an idle connection.

use std::error::Error;
use std::fs;
use std::net::TcpStream;

use crate::chain::{Chain, Driven, Server};
use crate::report::Table;
use crate::Outcome;

pub fn memory(_quick: bool) -> Result<Outcome, Box<dyn Error>> {
    const MANY: usize = 1000;
    let listeners = |count: usize| -> Result<f64, Box<dyn Error>> {
        let chain = Chain::start(&Server::new("server", &["way=auto"]).with("listeners", count))?;
        resident(chain.pid())
    };
    let listener = (listeners(MANY + 1)? - listeners(1)?) / MANY as f64;
    let mut table = Table::new(&["", "bytes of resident memory"]);
    table.row(vec!["a listener".into(), format!("{listener:.0}")]);
    for (name, way) in [("`next_request`", "way=keep"), ("a plain blocking read", "way=keep-block")] {
        let mut server = Driven::spawn(Server::new("server", &[way]).command()?)?;
        let port: u16 = server.expect("port")?.0.split_whitespace().nth(1).unwrap_or_default().parse()?;
        let connect = || TcpStream::connect(("127.0.0.1", port));
        // The first one has allocated everything that all of them share.
        let first = settled(connect()?)?;
        let before = resident(server.pid())?;
        let more = (0..MANY).map(|_| settled(connect()?)).collect::<Result<Vec<_>, _>>()?;
        let connection = (resident(server.pid())? - before) / MANY as f64;
        table.row(vec![format!("an idle connection with a thread that waits in {name}"), format!("{connection:.0}")]);
        drop((first, more));
    }
    Ok(Outcome { text: table.markdown(), picture: None, summary: Vec::new() })
}

/// A connection whose thread has answered once and waits for the next request.
fn settled(mut stream: TcpStream) -> Result<TcpStream, Box<dyn Error>> {
    use std::io::{Read, Write};
    stream.write_all(b"a request\n")?;
    stream.read_exact(&mut [0; 7])?;
    Ok(stream)
}

fn resident(pid: i32) -> Result<f64, Box<dyn Error>> {
    let pages = fs::read_to_string(format!("/proc/{pid}/statm"))?;
    let pages: f64 = pages.split_whitespace().nth(1).ok_or("statm")?.parse()?;
    Ok(pages * 4096.0)
}
