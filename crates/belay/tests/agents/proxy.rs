//! A network between two hosts that can be cut, frozen and slowed down: a TCP proxy in the test's process.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Result;

/// How often a thread that waits for data looks what it is to do.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// A direction of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// From who has connected.
    There,
    /// To who has connected.
    Back,
}

#[derive(Default)]
struct State {
    /// New connections are closed at once.
    cut: AtomicBool,
    /// Nothing is forwarded this way, nothing is closed.
    frozen: [AtomicBool; 2],
    /// Each piece of data is held back for so long, in microseconds.
    delay_us: AtomicU64,
    ended: AtomicBool,
    open: Mutex<Vec<TcpStream>>,
}

/// What forwards connections to one address.
pub(crate) struct Proxy {
    state: Arc<State>,
    /// Where to connect instead.
    pub(crate) address: SocketAddr,
}

impl Proxy {
    /// A proxy for `target`.
    pub(crate) fn start(target: &str) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let state = Arc::new(State::default());
        let (accepting, target) = (Arc::clone(&state), target.to_owned());
        std::thread::spawn(move || {
            for inward in listener.incoming().flatten() {
                if accepting.ended.load(Ordering::SeqCst) {
                    return;
                }
                if accepting.cut.load(Ordering::SeqCst) {
                    continue;
                }
                let Ok(outward) = TcpStream::connect(&target) else { continue };
                let _ = join(&accepting, inward, outward);
            }
        });
        Ok(Self { state, address })
    }

    /// Closes all connections, and new ones at once, until [`Proxy::heal`].
    pub(crate) fn cut(&self) {
        self.state.cut.store(true, Ordering::SeqCst);
        self.drop_all();
    }

    /// Closes all connections; new ones are welcome.
    pub(crate) fn drop_all(&self) {
        for stream in self.state.open.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Forwards nothing more this way, without a word, until [`Proxy::heal`].
    pub(crate) fn freeze(&self, way: Way) {
        self.state.frozen[way as usize].store(true, Ordering::SeqCst);
    }

    /// Holds every piece of data back.
    pub(crate) fn delay(&self, delay: Duration) {
        self.state.delay_us.store(delay.as_micros() as u64, Ordering::SeqCst);
    }

    /// A good network again.
    pub(crate) fn heal(&self) {
        self.state.cut.store(false, Ordering::SeqCst);
        self.state.frozen.iter().for_each(|frozen| frozen.store(false, Ordering::SeqCst));
        self.state.delay_us.store(0, Ordering::SeqCst);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.state.ended.store(true, Ordering::SeqCst);
        self.heal();
        self.drop_all();
        let _ = TcpStream::connect(self.address);
    }
}

fn join(state: &Arc<State>, inward: TcpStream, outward: TcpStream) -> Result<()> {
    let mut open = state.open.lock().unwrap();
    for (from, to, way) in [(&inward, &outward, Way::There), (&outward, &inward, Way::Back)] {
        from.set_read_timeout(Some(LOOK_EVERY))?;
        from.set_nodelay(true)?;
        let (from, to, state) = (from.try_clone()?, to.try_clone()?, Arc::clone(state));
        std::thread::spawn(move || forward(&state, from, to, way));
    }
    open.extend([inward, outward]);
    Ok(())
}

fn forward(state: &State, mut from: TcpStream, mut to: TcpStream, way: Way) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let got = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(got) => got,
            Err(error)
                if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) =>
            {
                if state.ended.load(Ordering::SeqCst) {
                    break;
                }
                continue;
            }
            Err(_) => break,
        };
        while state.frozen[way as usize].load(Ordering::SeqCst) && !state.ended.load(Ordering::SeqCst) {
            std::thread::sleep(LOOK_EVERY);
        }
        let delay = state.delay_us.load(Ordering::SeqCst);
        if delay > 0 {
            std::thread::sleep(Duration::from_micros(delay));
        }
        if to.write_all(&buffer[..got]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}
