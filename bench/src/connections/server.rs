//! The server that is moved: what a client says comes back.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;

use anyhow::Result;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{Backlog, listen};

/// Serves until it is killed.
///
/// # Errors
/// The address cannot be had.
pub fn serve(address: IpAddr, port: u16) -> Result<()> {
    let listener = TcpListener::bind((address, port))?;
    // More than std's 128: clients come all at once.
    listen(&listener, Backlog::new(4096)?)?;
    listener.set_nonblocking(true)?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
    let mut clients: HashMap<u64, TcpStream> = HashMap::new();
    let mut events = vec![EpollEvent::empty(); 1024];
    let mut buffer = [0; 4096];
    loop {
        let count = match epoll.wait(&mut events, EpollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => continue,
            count => count?,
        };
        for event in &events[..count] {
            let number = event.data();
            if number == 0 {
                while let Ok((stream, _)) = listener.accept() {
                    stream.set_nonblocking(true)?;
                    stream.set_nodelay(true)?;
                    let number = stream.as_raw_fd() as u64;
                    epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, number))?;
                    clients.insert(number, stream);
                }
                continue;
            }
            let Some(client) = clients.get_mut(&number) else { continue };
            match client.read(&mut buffer) {
                Ok(0) => {
                    clients.remove(&number);
                }
                Ok(length) => client.write_all(&buffer[..length])?,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => eprintln!("a client is lost: {error}"),
            }
        }
    }
}
