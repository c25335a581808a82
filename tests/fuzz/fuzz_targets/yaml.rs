//! Policy text: no panic, no endless work, whatever the bytes.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    segfw::policy::fuzz_yaml(data);
});
