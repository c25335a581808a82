//! Frames and packets: the reader that XDP and the hooks use.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    segfw_common::packet::fuzz_packet(data);
});
