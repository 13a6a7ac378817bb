//! Documents of images, as registries, archives and other nodes send them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vistara_image::manifest::{self, Document};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(document) = manifest::parse_document(bytes, None) {
        if let Document::Manifest(manifest) = &document {
            let _ = manifest::check_media_types(manifest);
        }
    }
    let _ = manifest::parse_config(bytes);
});
