//! Addresses and the proxy's URL: what is accepted is written as it is read, and a
//! password is never taken from the command line.
#![no_main]

use libfuzzer_sys::fuzz_target;
use underpass::address::{HostPort, Listen};

fuzz_target!(|text: &str| {
    if let Ok(address) = text.parse::<HostPort>() {
        assert!(!address.host.is_empty() && address.port != 0);
        assert_eq!(address.to_string().parse(), Ok(address));
    }
    if let Ok(address) = text.parse::<Listen>() {
        assert_eq!(address.to_string().parse(), Ok(address));
    }
    underpass::fuzzing::proxy_url(text);
});
