//! Whatever a SOCKS5 proxy answers: the handshake ends, in success only after a
//! reply that says so, and the message of a failure has nothing of the login.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (bool, bool, &[u8])| {
    let (login, by_name, answer) = input;
    underpass::fuzzing::socks(login, by_name, answer);
});
