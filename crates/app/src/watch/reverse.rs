//! Reverse look-ups (`--reverse`), by the system's resolver on a thread of their own:
//! it may take seconds, and nobody waits for it.

use std::{
    collections::HashSet,
    sync::mpsc::{Receiver, SyncSender, TryIter, channel, sync_channel},
    thread,
    time::Duration,
};

use underpass_abi::watch::Address;

use super::output::ip;

/// How long a name that was found counts; the resolver does not tell.
pub const LIVES: Duration = Duration::from_hours(1);
/// How many addresses may wait; the others are asked for later.
const WAITING: usize = 64;
/// How many addresses are known to have been asked for, before that is forgotten.
const ASKED: usize = 16384;

/// Asks and collects.
#[derive(Debug)]
pub struct Reverse {
    questions: SyncSender<Address>,
    answers: Receiver<(Address, String)>,
    asked: HashSet<Address>,
}

impl Reverse {
    /// Starts the thread; it ends when this is dropped.
    pub fn start() -> Self {
        let (questions, waiting) = sync_channel::<Address>(WAITING);
        let (sender, answers) = channel();
        thread::spawn(move || {
            for address in waiting {
                let ip = ip(&address);
                // Where there is no name the resolver gives the address back.
                if let Ok(name) = dns_lookup::lookup_addr(&ip)
                    && name != ip.to_string()
                    && sender.send((address, name)).is_err()
                {
                    return;
                }
            }
        });
        Self { questions, answers, asked: HashSet::new() }
    }

    /// Asks for those that have not been asked for.
    pub fn ask(&mut self, addresses: impl Iterator<Item = Address>) {
        if self.asked.len() > ASKED {
            self.asked.clear();
        }
        for address in addresses.filter(|address| *address != [0; 16]) {
            if !self.asked.contains(&address) {
                if self.questions.try_send(address).is_err() {
                    return;
                }
                self.asked.insert(address);
            }
        }
    }

    /// What has been found since the last call.
    pub fn answers(&self) -> TryIter<'_, (Address, String)> {
        self.answers.try_iter()
    }
}
