//! The names of remote hosts, from the answers of name servers that the processes
//! of this host received.

use std::{
    collections::{HashSet, VecDeque},
    rc::Rc,
    time::Duration,
};

use foldhash::HashMap;
use hickory_proto::{
    op::{Message, MessageType},
    rr::{Name, RData},
};
use underpass_abi::watch::Address;

use super::event::Answer;

/// How many addresses are remembered; the oldest make room.
const ADDRESSES: usize = 16384;
/// Connections follow their answer, but not always at once: an answer counts for
/// at least this long, whatever its time to live.
const AT_LEAST: Duration = Duration::from_mins(1);
/// How many TCP streams of answers are put together at a time, each of at most one
/// message (RFC 1035 section 4.2.2: two bytes of length, then as many bytes).
const STREAMS: usize = 64;

/// Which name each address was last asked for by.
#[derive(Debug, Default)]
pub struct Names {
    known: HashMap<Address, Known>,
    order: VecDeque<Address>,
    streams: HashMap<u64, Vec<u8>>,
}

#[derive(Debug)]
struct Known {
    name: Rc<str>,
    until: u64,
}

impl Names {
    /// Takes in what a process received from port 53. `now` is in nanoseconds.
    pub fn learn(&mut self, answer: &Answer, now: u64) {
        let whole = answer.received as usize == answer.bytes.len();
        if !answer.stream {
            if whole {
                self.message(&answer.bytes, now);
            }
            return;
        }
        if !whole || (self.streams.len() >= STREAMS && !self.streams.contains_key(&answer.cookie)) {
            // With a piece missing the rest cannot be cut into messages.
            self.streams.remove(&answer.cookie);
            return;
        }
        let mut stream = self.streams.remove(&answer.cookie).unwrap_or_default();
        stream.extend_from_slice(&answer.bytes);
        while let Some((len, rest)) = stream.split_first_chunk::<2>() {
            let len = usize::from(u16::from_be_bytes(*len));
            let Some(message) = rest.get(..len) else { break };
            self.message(message, now);
            stream.drain(..2 + len);
        }
        if !stream.is_empty() {
            self.streams.insert(answer.cookie, stream);
        }
    }

    /// A name from another source, a reverse look-up.
    pub fn enter(&mut self, address: Address, name: &str, lives: Duration, now: u64) {
        let until = now + lives.max(AT_LEAST).as_nanos() as u64;
        if self.known.insert(address, Known { name: name.into(), until }).is_none() {
            self.order.push_back(address);
        }
        if self.order.len() > ADDRESSES
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
    }

    /// The name by which an address was asked for, if that still counts.
    pub fn of(&self, address: &Address, now: u64) -> Option<Rc<str>> {
        self.known.get(address).filter(|known| now <= known.until).map(|known| known.name.clone())
    }

    #[expect(clippy::wildcard_enum_match_arm, reason = "of all kinds of records two carry addresses")]
    /// Learns from the addresses that belong to the question, along its CNAMEs.
    fn message(&mut self, bytes: &[u8], now: u64) {
        let Ok(message) = Message::from_vec(bytes) else { return };
        let Some(question) = message.queries.first() else { return };
        if message.metadata.message_type != MessageType::Response {
            return;
        }
        let asked = question.name();
        let names = aliases(asked, &message);
        let text = asked.to_ascii().to_ascii_lowercase();
        let text = text.strip_suffix('.').unwrap_or(&text);
        for record in message.answers.iter().filter(|record| names.contains(&record.name)) {
            let lives = Duration::from_secs(record.ttl.into());
            match &record.data {
                RData::A(address) => self.enter(address.0.to_ipv6_mapped().octets(), text, lives, now),
                RData::AAAA(address) => self.enter(address.0.octets(), text, lives, now),
                _ => {}
            }
        }
    }
}

/// The asked name and all that it is an alias of.
fn aliases(asked: &Name, message: &Message) -> HashSet<Name> {
    let mut names = HashSet::from([asked.clone()]);
    // Each round adds at least one name, or it is the last.
    for _ in 0..message.answers.len() {
        let before = names.len();
        for record in &message.answers {
            if let RData::CNAME(target) = &record.data
                && names.contains(&record.name)
            {
                names.insert(target.0.clone());
            }
        }
        if names.len() == before {
            break;
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use hickory_proto::{
        op::{OpCode, Query},
        rr::{
            Record, RecordType,
            rdata::{A, CNAME},
        },
    };

    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn name(text: &str) -> Name {
        Name::from_ascii(text).unwrap()
    }

    fn response() -> Vec<u8> {
        let mut message = Message::new(7, MessageType::Response, OpCode::Query);
        message.queries.push(Query::query(name("www.example.test."), RecordType::A));
        // The chain is out of order, and the last address is nobody's answer.
        for record in [
            Record::from_rdata(name("c.example.test."), 300, RData::A(A(Ipv4Addr::new(192, 0, 2, 1)))),
            Record::from_rdata(name("b.example.test."), 300, RData::CNAME(CNAME(name("c.example.test.")))),
            Record::from_rdata(name("www.example.test."), 300, RData::CNAME(CNAME(name("b.example.test.")))),
            Record::from_rdata(name("other.example.test."), 300, RData::A(A(Ipv4Addr::new(192, 0, 2, 2)))),
        ] {
            message.answers.push(record);
        }
        message.to_vec().unwrap()
    }

    fn mapped(last: u8) -> Address {
        Ipv4Addr::new(192, 0, 2, last).to_ipv6_mapped().octets()
    }

    fn piece(bytes: &[u8], stream: bool) -> Answer {
        Answer { cookie: 1, stream, received: bytes.len() as u32, bytes: bytes.to_vec() }
    }

    #[test]
    fn follows_aliases_and_takes_no_stranger() {
        let mut names = Names::default();
        names.learn(&piece(&response(), false), 0);
        assert_eq!(names.of(&mapped(1), 0).as_deref(), Some("www.example.test"));
        assert_eq!(names.of(&mapped(2), 0), None);
    }

    #[test]
    fn forgets_after_the_time_to_live() {
        let mut names = Names::default();
        names.learn(&piece(&response(), false), 0);
        assert!(names.of(&mapped(1), 299 * SECOND).is_some());
        assert!(names.of(&mapped(1), 301 * SECOND).is_none());
    }

    #[test]
    fn puts_a_stream_together_from_any_pieces() {
        let message = response();
        let mut stream = (message.len() as u16).to_be_bytes().to_vec();
        stream.extend_from_slice(&message);
        for size in [1, 2, 3, 50, stream.len()] {
            let mut names = Names::default();
            for bytes in stream.chunks(size) {
                names.learn(&piece(bytes, true), 0);
            }
            assert!(names.of(&mapped(1), 0).is_some(), "in pieces of {size}");
            assert!(names.streams.is_empty());
        }
    }

    #[test]
    fn takes_rubbish_without_harm() {
        let message = response();
        let mut names = Names::default();
        for len in 0..message.len() {
            names.learn(&piece(&message[..len], false), 0);
            names.learn(&piece(&message[..len], true), 0);
        }
        names.learn(&piece(&[0xff; 600], false), 0);
        assert!(names.known.len() <= 2);
    }

    #[test]
    fn stays_within_its_bound() {
        let mut names = Names::default();
        for number in 0..2 * ADDRESSES as u128 {
            names.enter(number.to_be_bytes(), "x", Duration::ZERO, 0);
        }
        assert_eq!((names.known.len(), names.order.len()), (ADDRESSES, ADDRESSES));
    }
}
