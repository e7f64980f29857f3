//! The parts of a load: its workers, and the run from preparation to the last command.

use crate::console::{self, Command, Console};
use crate::pattern::{Mismatch, mix};
use crate::race::Race;
use crate::stats::{OpKind, Stats, monotonic_ns};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The longest operation, bytes.
pub const MAX_IO_BYTES: usize = 64 << 10;

/// What O_DIRECT may ask of a buffer's address.
const ALIGNMENT: usize = 4096;

/// A load: what is prepared, done over and over, and verified at the end.
///
/// A *unit* is what preparation and verification go through: 64 KiB of a disk, or a file.
pub trait Load: Send + Sync {
    /// What it works on, for reports.
    fn target(&self) -> String;
    /// How many units there are.
    fn units(&self) -> usize;
    /// How many blocks these have.
    fn blocks(&self) -> usize;
    /// Writes the first version of a unit.
    fn prepare(&self, unit: usize, worker: &mut Worker<'_>);
    /// One operation.
    fn step(&self, worker: &mut Worker<'_>);
    /// Reads and checks a unit while nobody writes.
    fn verify(&self, unit: usize, worker: &mut Worker<'_>);
    /// Makes everything that was acknowledged durable.
    fn sync(&self, worker: &mut Worker<'_>);
}

/// One of the threads that keep I/O going: one operation in flight at a time.
pub struct Worker<'a> {
    /// Its number, from 0.
    pub id: usize,
    /// How many operations it has begun.
    pub sequence: u64,
    stats: &'a Stats,
    console: &'a Console,
    random: u64,
    buffer: Buffer,
}

impl<'a> Worker<'a> {
    /// A worker whose choices depend on `seed` and its number only.
    #[must_use]
    pub fn new(id: usize, seed: u64, stats: &'a Stats, console: &'a Console) -> Self {
        let random = mix(seed ^ mix(id as u64 + 1));
        Self { id, sequence: 0, stats, console, random, buffer: Buffer::new() }
    }

    /// A number below `end`, which must not be 0.
    pub fn choose(&mut self, end: usize) -> usize {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        (mix(self.random) % end as u64) as usize
    }

    /// True in so many of a hundred cases.
    pub fn chance(&mut self, percent: usize) -> bool {
        self.choose(100) < percent
    }

    /// Its buffer, [`MAX_IO_BYTES`] long.
    pub fn buffer(&mut self) -> &mut [u8] {
        self.buffer.bytes()
    }

    /// Does an operation on the first `len` bytes of the buffer, and counts it. `at` is for the report of an error.
    pub fn timed(
        &mut self,
        kind: OpKind,
        at: u64,
        len: usize,
        operation: impl FnOnce(&mut [u8]) -> io::Result<()>,
    ) -> bool {
        self.sequence += 1;
        self.stats.begin(self.id);
        match operation(&mut self.buffer.bytes()[..len]) {
            Ok(()) => {
                self.stats.succeeded(self.id, kind, len);
                true
            }
            Err(error) => {
                self.stats.failed(self.id);
                self.console.error(kind, at, &error);
                false
            }
        }
    }

    /// A block that was read is wrong.
    pub fn mismatch(&self, at: u64, oldest: u32, newest: u32, found: Mismatch) {
        self.stats.mismatches.fetch_add(1, Ordering::Relaxed);
        self.console.mismatch(at, oldest, newest, found);
    }
}

/// Memory that O_DIRECT accepts.
pub(crate) struct Buffer {
    memory: Vec<u8>,
    start: usize,
}

impl Buffer {
    pub(crate) fn new() -> Self {
        let memory = vec![0; MAX_IO_BYTES + ALIGNMENT];
        // A vector that never grows does not move.
        let start = memory.as_ptr().align_offset(ALIGNMENT);
        Self { memory, start }
    }

    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + MAX_IO_BYTES]
    }
}

/// How a load is run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Workers: operations in flight.
    pub threads: usize,
    /// Seed of all choices.
    pub seed: u64,
    /// The target holds version 1 of every block already.
    pub prepared: bool,
    /// End after this time; without it, at the command `poweroff`.
    pub limit: Option<Duration>,
    /// Time between reports.
    pub report_every: Duration,
}

/// What a run came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Operations that failed.
    pub errors: u64,
    /// Blocks that were wrong.
    pub mismatches: u64,
}

/// Prepares the target, keeps I/O going, obeys commands, and returns when told to end.
pub fn run(
    load: &dyn Load,
    options: &Options,
    stats: &Arc<Stats>,
    console: &Console,
    commands: &Receiver<Command>,
) -> Outcome {
    let run = Run { load, options, stats, console, gate: Gate::default() };
    if !options.prepared {
        let begun = Instant::now();
        run.each_unit(|unit, worker| load.prepare(unit, worker));
        console.line(&format!(
            r#"{{"prepared":{{"blocks":{},"ms":{}}}}}"#,
            load.blocks(),
            begun.elapsed().as_millis()
        ));
    }
    console.line(&format!(
        r#"{{"ready":{{"target":{},"blocks":{},"threads":{},"t_ns":{}}}}}"#,
        console::quoted(&load.target()),
        load.blocks(),
        options.threads,
        monotonic_ns()
    ));
    std::thread::scope(|scope| {
        for id in 0..options.threads {
            let run = &run;
            scope.spawn(move || {
                let mut worker = Worker::new(id, options.seed, stats, console);
                while run.gate.pass() {
                    load.step(&mut worker);
                }
            });
        }
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| console.report_until(&ended, options.report_every, stats));
            run.obey(commands);
            run.gate.end();
            ended.store(true, Ordering::SeqCst);
        });
    });
    let last = stats.snapshot();
    console.line(&format!(r#"{{"end":{}}}"#, console::report(&last)));
    Outcome { errors: last.errors, mismatches: last.mismatches }
}

struct Run<'a> {
    load: &'a dyn Load,
    options: &'a Options,
    stats: &'a Stats,
    console: &'a Console,
    gate: Gate,
}

impl Run<'_> {
    /// Obeys commands until one ends the run, or its time is over.
    fn obey(&self, commands: &Receiver<Command>) {
        let end = self.options.limit.map(|limit| Instant::now() + limit);
        let mut race = Race::new(&self.load.target());
        loop {
            let command = match end {
                None => commands.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(end) => commands.recv_timeout(end.saturating_duration_since(Instant::now())),
            };
            match command {
                Ok(Command::Verify) => self.verify(),
                Ok(Command::Stop) => {
                    self.gate.close(self.options.threads);
                    self.console.line(&format!(r#"{{"stopped":{{"t_ns":{}}}}}"#, monotonic_ns()));
                }
                Ok(Command::Start) => {
                    self.gate.open();
                    self.console.line(&format!(r#"{{"started":{{"t_ns":{}}}}}"#, monotonic_ns()));
                }
                Ok(Command::Sync) => self.sync(),
                Ok(Command::Quiet) => self.console.set_reports(false),
                Ok(Command::Report) => self.console.set_reports(true),
                Ok(Command::Older) => self.console.line(&race.older()),
                Ok(Command::Newer) => self.console.line(&race.newer()),
                Ok(Command::Reboot) => {
                    let error = console::reset_machine().to_string();
                    self.console.line(&format!(r#"{{"fatal":{}}}"#, console::quoted(&error)));
                }
                Ok(Command::PowerOff) | Err(RecvTimeoutError::Timeout) => break,
                // No more commands can come; the load goes on until its time is over.
                Err(RecvTimeoutError::Disconnected) => {
                    let Some(end) = end else {
                        loop {
                            std::thread::park();
                        }
                    };
                    std::thread::sleep(end.saturating_duration_since(Instant::now()));
                    break;
                }
            }
        }
        self.gate.close(self.options.threads);
        self.sync();
    }

    fn verify(&self) {
        let was_open = self.gate.close(self.options.threads);
        let count = || {
            let get = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::SeqCst);
            (get(&self.stats.errors), get(&self.stats.mismatches))
        };
        let (begun, before) = (Instant::now(), count());
        self.each_unit(|unit, worker| self.load.verify(unit, worker));
        let after = count();
        self.console.line(&format!(
            r#"{{"verified":{{"blocks":{},"errors":{},"mismatches":{},"ms":{},"t_ns":{}}}}}"#,
            self.load.blocks(),
            after.0 - before.0,
            after.1 - before.1,
            begun.elapsed().as_millis(),
            monotonic_ns()
        ));
        if was_open {
            self.gate.open();
        }
    }

    fn sync(&self) {
        let was_open = self.gate.close(self.options.threads);
        self.load.sync(&mut Worker::new(0, self.options.seed, self.stats, self.console));
        self.console.line(&format!(r#"{{"synced":{{"t_ns":{}}}}}"#, monotonic_ns()));
        if was_open {
            self.gate.open();
        }
    }

    /// Goes through all units with as many threads as there are workers; these must be stopped.
    fn each_unit(&self, work: impl Fn(usize, &mut Worker<'_>) + Sync) {
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for id in 0..self.options.threads {
                let (next, work) = (&next, &work);
                scope.spawn(move || {
                    let mut worker = Worker::new(id, self.options.seed, self.stats, self.console);
                    loop {
                        let unit = next.fetch_add(1, Ordering::SeqCst);
                        if unit >= self.load.units() {
                            break;
                        }
                        work(unit, &mut worker);
                    }
                });
            }
        });
    }
}

/// Lets the workers pass, or holds them between two operations.
#[derive(Default)]
struct Gate {
    closed: AtomicBool,
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    held: usize,
    ended: bool,
}

impl Gate {
    /// Called by a worker between operations: whether to go on.
    fn pass(&self) -> bool {
        if !self.closed.load(Ordering::SeqCst) {
            return true;
        }
        let mut state = self.lock();
        state.held += 1;
        self.changed.notify_all();
        while self.closed.load(Ordering::SeqCst) && !state.ended {
            state = self.wait(state);
        }
        state.held -= 1;
        !state.ended
    }

    /// Holds the workers; returns when all of them are held. Says whether the gate was open.
    fn close(&self, workers: usize) -> bool {
        let was_open = !self.closed.swap(true, Ordering::SeqCst);
        let mut state = self.lock();
        while state.held < workers {
            state = self.wait(state);
        }
        was_open
    }

    fn open(&self) {
        let _state = self.lock();
        self.closed.store(false, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Lets the workers end. The gate must be closed.
    fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, GateState>) -> MutexGuard<'a, GateState> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }
}
