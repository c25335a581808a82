//! Records of the ring buffer, as shown to people: no panic.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = segfw::flow::fuzz::fuzz_event(data);
});
