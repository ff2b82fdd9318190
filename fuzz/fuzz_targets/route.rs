//! Routes and lengths as mux takes them: what is accepted is written as it is read,
//! and of two routes that stand together some payload reaches the second.
#![no_main]

use libfuzzer_sys::fuzz_target;
use underpass::mux::route::{Lengths, Match, parse};

fuzz_target!(|text: &str| {
    if let Ok(lengths) = text.parse::<Lengths>() {
        assert!(lengths.0.start() <= lengths.0.end());
        assert_eq!(lengths.to_string().parse(), Ok(lengths));
    }
    let texts: Vec<String> = text.lines().map(str::to_owned).collect();
    let Ok(routes) = parse(&texts, |target| Ok(target.to_owned())) else { return };
    assert_eq!(routes.len(), texts.len());
    for route in &routes {
        let written = route.matches.to_string();
        assert_eq!(written.parse::<Match>().as_ref(), Ok(&route.matches), "{written}");
    }
});
