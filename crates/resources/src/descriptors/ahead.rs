//! Sockets that are made as they are told of, while the source still takes others apart.
//!
//! What cannot be made yet is made with all the rest, and it is then that errors are told: a port may be taken by a socket that is
//! only told of later.

use super::connection::{Restored, Supply};
use super::{event, listener};
use crate::{Error, Result};
use godwit_kernel::Errno;
use godwit_proto::image::InetSkEntry;
use godwit_proto::wire::{ExpectedConnection, StreamContent, Streams};
use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// A connection that is complete and still in repair mode: its socket, and what wakes it.
type Made = (Arc<OwnedFd>, Restored);

/// Connections, and the TCP sockets that have to be there before them. Dropped, they are gone without a word.
#[derive(Debug, Default)]
pub struct Ahead {
    supply: Supply,
    /// Sockets of which nothing but that is known, by their file's id.
    described: HashMap<u32, Box<InetSkEntry>>,
    /// What is there, by its file's id.
    made: HashMap<u32, Arc<OwnedFd>>,
    restored: Vec<Restored>,
    /// What is not.
    waiting: Vec<(Box<InetSkEntry>, StreamContent)>,
    /// Something could not be made: what follows might need it.
    is_off: bool,
    /// There can be no more sockets than are needed.
    is_full: bool,
}

impl Ahead {
    /// Makes what a message tells of: its streams are whole.
    ///
    /// # Errors
    /// When this program can have no more sockets: nothing comes of it then.
    pub fn add(&mut self, message: Streams) -> Result<()> {
        self.supply.add(message.option_sets);
        self.expect(&message.expected);
        // N.B. these first: one that shares its port with nobody must have it before its connections are there.
        let others = message.sockets.iter().filter(|socket| !listener::is_connection(socket));
        for socket in others.filter(|socket| listener::is_described(socket)) {
            self.attempt("a socket", |ahead| {
                let made = make(socket)?;
                ahead.made.insert(socket.id, Arc::new(made));
                Ok(())
            })?;
        }
        let connections = message.sockets.into_iter().filter(listener::is_connection);
        self.described.extend(connections.map(|socket| (socket.id, Box::new(socket))));
        let mut ready = Vec::with_capacity(message.streams.len());
        for content in message.streams {
            ready.extend(self.described.remove(&content.id).map(|socket| (socket, content)));
        }
        let is_made = self.attempt("connections", |ahead| {
            let named: Vec<_> = ready.iter().map(|(socket, content)| (String::new(), &**socket, content)).collect();
            let made = ahead.supply.rebuild(&named)?;
            for ((socket, _), (made, restored)) in ready.iter().zip(made) {
                ahead.made.insert(socket.id, made);
                ahead.restored.push(restored);
            }
            Ok(())
        })?;
        if !is_made {
            self.waiting.extend(ready);
        }
        Ok(())
    }

    /// Makes sockets for connections that are going to come. What cannot be made now is made when it comes.
    fn expect(&mut self, expected: &[ExpectedConnection]) {
        for one in expected {
            if self.is_full {
                return;
            }
            let family = one.socket.as_ref().map_or(0, |socket| socket.family);
            if let Err(error) = self.supply.expect(family, one.option_set) {
                tracing::debug!(%error, "a socket cannot be made in advance");
                if is_exhausted(&error) {
                    // What comes must not find that there are none left because of those that do not.
                    self.is_full = true;
                    self.supply.take_blanks();
                }
            }
        }
    }

    fn attempt(&mut self, what: &str, make: impl FnOnce(&mut Self) -> Result<()>) -> Result<bool> {
        if self.is_off {
            return Ok(false);
        }
        match make(self) {
            Ok(()) => Ok(true),
            Err(error) if is_exhausted(&error) => Err(error),
            Err(error) => {
                tracing::debug!(%error, "{what} cannot be made ahead of the rest");
                self.is_off = true;
                Ok(false)
            }
        }
    }

    /// Whether nothing was told of.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.made.is_empty() && self.waiting.is_empty()
    }

    /// Takes out what was made, by its file's id.
    pub(super) fn take_made(&mut self) -> (HashMap<u32, Arc<OwnedFd>>, Vec<Restored>) {
        (std::mem::take(&mut self.made), std::mem::take(&mut self.restored))
    }

    /// Takes out the sockets that nothing has come for.
    pub(super) fn take_blanks(&mut self) -> Vec<OwnedFd> {
        self.supply.take_blanks()
    }

    /// The files of connections that are not made yet.
    pub(super) fn waiting(&self) -> HashSet<u32> {
        self.waiting.iter().map(|(socket, _)| socket.id).collect()
    }

    /// Makes the connections that could not be made ahead: `name` says what each is called, `None` that nobody wants it.
    pub(super) fn make_rest(&mut self, name: impl Fn(u32) -> Option<String>) -> Result<Vec<(u32, Made)>> {
        let named = self.waiting.iter().filter_map(|(socket, content)| Some((name(socket.id)?, &**socket, content)));
        let named: Vec<_> = named.collect();
        let made = self.supply.rebuild(&named)?;
        Ok(named.iter().map(|(_, socket, _)| socket.id).zip(made).collect())
    }
}

/// Whether this program can have no more sockets.
fn is_exhausted(error: &Error) -> bool {
    matches!(error, Error::Call { source: Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM, .. })
}

/// Makes a TCP socket that has no connection.
pub(super) fn make(socket: &InetSkEntry) -> Result<OwnedFd> {
    let made = listener::rebuild(socket)?;
    event::set_status(&made, socket.flags).map_err(|source| Error::call("socket", "F_SETFL", source))?;
    Ok(made)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::descriptors::connection::{self, Candidate, Connections};
    use crate::descriptors::early_connections::EarlyConnections;
    use crate::descriptors::table::Entry;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn what_cannot_be_made_ahead_is_made_at_the_end() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let entry = Entry::of_socket(7, listener.accept().unwrap().0.into()).unwrap();
        let inet = listener::tcp(&entry).unwrap().unwrap();
        let mut connections = Connections::default();
        let mut told = Streams::default();
        let candidates = [Candidate { entry: &entry, inet, id: 3 }];
        connection::collect(&candidates, &EarlyConnections::default(), &mut connections, &mut |some| told = some)
            .unwrap();
        let name = |id| (id == 3).then(|| "fd 7".to_owned());

        // As long as it is here, nobody else can have it.
        let mut late = Ahead::default();
        late.add(told.clone()).unwrap();
        assert!(late.waiting().contains(&3) && !late.is_empty());
        let refused = late.make_rest(name).unwrap_err().to_string();
        assert!(refused.starts_with("TCP connection 127.0.0.1:"), "{refused}");
        connections.forget();
        drop(entry);
        let made = late.make_rest(name).unwrap();
        assert_eq!(made.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [3]);
        assert!(late.make_rest(|_| None).unwrap().is_empty(), "nobody wants it");
        drop(made);

        let mut early = Ahead::default();
        early.add(Streams { streams: Vec::new(), ..told.clone() }).unwrap();
        assert!(early.is_empty(), "its content is not here");
        early.add(Streams { sockets: Vec::new(), option_sets: Vec::new(), ..told }).unwrap();
        assert!(early.waiting().is_empty() && !early.is_empty());
        let (made, restored) = early.take_made();
        assert_eq!((made.keys().copied().collect::<Vec<_>>(), restored.len()), (vec![3], 1));
    }

    #[test]
    fn what_is_expected_has_a_socket_before_it_comes() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let accepted = listener.accept().unwrap().0;
        accepted.set_nodelay(true).unwrap();
        let entry = Entry::of_socket(7, accepted.into()).unwrap();
        let inet = listener::tcp(&entry).unwrap().unwrap();
        let mut connections = Connections::default();
        let mut told = Streams::default();
        let candidates = [Candidate { entry: &entry, inet, id: 3 }];
        connection::collect(&candidates, &EarlyConnections::default(), &mut connections, &mut |some| told = some)
            .unwrap();
        connections.forget();
        drop(entry);

        let mut ahead = Ahead::default();
        let one = |option_set| ExpectedConnection { socket: Some(told.sockets[0].clone()), option_set };
        let option_sets = told.option_sets.clone();
        let mut strange = one(0);
        strange.socket.as_mut().unwrap().family = 77;
        let expected = vec![one(0), one(0), one(9), strange];
        ahead.add(Streams { expected, option_sets, ..Streams::default() }).unwrap();
        assert_eq!(ahead.supply.in_stock(), 2, "there is no set 9, and no family 77");
        assert!(ahead.is_empty(), "it has not come");
        ahead.add(Streams { option_sets: Vec::new(), ..told }).unwrap();
        assert_eq!(ahead.supply.in_stock(), 1);
        let (made, _) = ahead.take_made();
        assert!(nix::sys::socket::getsockopt(&made[&3], nix::sys::socket::sockopt::TcpNoDelay).unwrap());
        assert_eq!(ahead.take_blanks().len(), 1);
    }
}
