//! A server at an address that moves along, and clients on a third host that check everything.

use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result, ensure};

use crate::clients::{PATIENCE, caller, converse, download, upload};
use crate::{Migration, Mode, PageServer, Path, TwoHosts, Victim};

/// Where the victim `connections` listens.
const PORT: u16 = 6200;

/// Three hosts, a server at an address that moves, and its clients.
#[derive(Debug)]
pub struct Service {
    /// The hosts.
    pub hosts: TwoHosts,
    /// The server.
    pub victim: Victim,
    /// Where it is called.
    pub address: SocketAddr,
    /// Ends the clients.
    pub stop: Arc<AtomicBool>,
    /// What each client is called, and what it got done.
    pub busy: Vec<(&'static str, JoinHandle<Result<u64>>)>,
}

impl Service {
    /// Clients on the next host.
    ///
    /// # Errors
    /// What failed, on which host.
    pub fn start(ipv6: bool) -> Result<Self> {
        Self::start_behind(Path::default(), ipv6)
    }

    /// The same with clients at the end of a path.
    ///
    /// # Errors
    /// What failed, on which host.
    pub fn start_behind(path: Path, ipv6: bool) -> Result<Self> {
        Self::start_with(path, ipv6, &[])
    }

    /// With more words for the victim.
    ///
    /// # Errors
    /// What failed, on which host.
    pub fn start_with(path: Path, ipv6: bool, words_of_victim: &[&str]) -> Result<Self> {
        let hosts = TwoHosts::builder().with_distant_clients(path).build()?;
        let (ip, bits) = if ipv6 { ("fd77::100", "128") } else { ("10.77.0.100", "32") };
        let with_bits = format!("{ip}/{bits}");
        let mut words = vec!["address", "add", &with_bits, "dev", "godwit0"];
        words.extend(ipv6.then_some("nodad"));
        hosts.source.run("ip", &words)?;
        let victim = hosts.source.victim("connections", &[&[ip, "reuse=1"], words_of_victim].concat())?;
        let address = SocketAddr::new(ip.parse()?, PORT);
        Ok(Self { hosts, victim, address, stop: Arc::default(), busy: Vec::new() })
    }

    /// Makes a connection with a purpose, one of the victim's letters.
    ///
    /// # Errors
    /// What failed, on which host.
    pub fn connect(&self, purpose: u8) -> Result<TcpStream> {
        let mut stream = self.hosts.clients()?.connect_to(self.address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.write_all(&[purpose])?;
        Ok(stream)
    }

    /// A client that works until it is told to stop.
    ///
    /// # Errors
    /// What failed, on which host.
    pub fn employ(
        &mut self,
        what: &'static str,
        purpose: u8,
        work: fn(TcpStream, &AtomicBool) -> Result<u64>,
    ) -> Result<()> {
        let (stream, stop) = (self.connect(purpose)?, Arc::clone(&self.stop));
        self.busy.push((what, std::thread::spawn(move || work(stream, &stop))));
        Ok(())
    }

    /// Clients that never stop: conversations, and streams in both directions at full rate.
    ///
    /// # Errors
    /// What failed, on which host.
    pub fn employ_clients(&mut self, conversations: usize) -> Result<()> {
        for _ in 0..conversations {
            self.employ("conversation", b'e', converse)?;
        }
        self.employ("download", b'g', download)?;
        self.employ("upload", b'c', upload)
    }

    /// A client that calls again and again.
    ///
    /// # Errors
    /// What failed, on which host.
    pub fn employ_caller(&mut self) -> Result<()> {
        let caller = caller(self.hosts.clients()?, self.address, Arc::clone(&self.stop))?;
        self.busy.push(("caller", caller));
        Ok(())
    }

    /// Moves it to a page server, with its address.
    ///
    /// # Errors
    /// What failed, on which host.
    pub fn migrate(&self, server: &PageServer, mode: Mode) -> Result<Migration> {
        let address = self.address.ip().to_string();
        let host = if server.address.starts_with(self.hosts.source.address()) {
            &self.hosts.destination
        } else {
            &self.hosts.source
        };
        host.migrate(server, self.victim.pid()).mode(mode).arguments(&["--move-addr", &address]).run()
    }

    /// Moves it to a page server, which is at the destination if it is `there`.
    ///
    /// # Errors
    /// What failed, on which host.
    pub fn move_on(&mut self, server: &PageServer, there: &PageServer) -> Result<()> {
        let migration = self.migrate(server, Mode::Hybrid)?;
        migration.expect_moved().with_context(|| server.log())?;
        let host = if std::ptr::eq(server, there) { &self.hosts.destination } else { &self.hosts.source };
        self.victim.follow(host, &migration)?;
        self.victim.expect_beats(50).map(drop)
    }

    /// Ends all clients and the server; none may have seen anything wrong.
    ///
    /// # Errors
    /// What failed, on which host.
    pub fn finish(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        for (what, client) in self.busy.drain(..) {
            let done = client.join().map_err(|_| anyhow::anyhow!("a {what} panicked"))?;
            let done = done.with_context(|| format!("a {what}; the server: {}", self.victim.log()))?;
            ensure!(done > 0, "a {what} got nothing done");
        }
        self.victim.finish().map(drop)
    }
}
