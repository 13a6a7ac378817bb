//! Names for machines whose users gave none.

/// Qualities; with [`THINGS`] they give 4,096 names before a number is needed.
const QUALITIES: [&str; 64] = [
    "able", "amber", "ample", "apt", "arctic", "azure", "bold", "brave", "brief", "bright",
    "brisk", "calm", "civil", "clear", "clever", "cool", "crisp", "deep", "deft", "eager", "early",
    "fair", "fast", "fine", "firm", "fond", "free", "fresh", "gentle", "glad", "golden", "grand",
    "great", "green", "happy", "hardy", "jolly", "keen", "kind", "large", "light", "lively",
    "lucid", "lucky", "mellow", "merry", "mild", "neat", "noble", "patient", "plain", "polite",
    "proud", "quick", "quiet", "rapid", "ready", "silver", "smart", "solid", "steady", "swift",
    "tidy", "warm",
];

/// Things that fly, or see flying.
const THINGS: [&str; 64] = [
    "albatross",
    "avocet",
    "balloon",
    "bee",
    "bittern",
    "bunting",
    "buzzard",
    "comet",
    "condor",
    "crane",
    "crow",
    "curlew",
    "dove",
    "dragonfly",
    "dunlin",
    "eagle",
    "egret",
    "falcon",
    "finch",
    "firefly",
    "garuda",
    "glider",
    "goose",
    "grebe",
    "gull",
    "harrier",
    "hawk",
    "heron",
    "hoopoe",
    "ibis",
    "jay",
    "kestrel",
    "kingfisher",
    "kite",
    "lapwing",
    "lark",
    "linnet",
    "magpie",
    "martin",
    "meteor",
    "moth",
    "nightjar",
    "oriole",
    "osprey",
    "owl",
    "petrel",
    "pigeon",
    "pipit",
    "plover",
    "puffin",
    "raven",
    "robin",
    "rocket",
    "rook",
    "sparrow",
    "starling",
    "stork",
    "swallow",
    "swan",
    "swift",
    "tern",
    "thrush",
    "vimana",
    "wren",
];

/// A name that `taken` does not know, made from random numbers.
pub(crate) fn made_up_name(random: [u8; 4], taken: impl Fn(&str) -> bool) -> String {
    let [quality, thing, high, low] = random;
    let pick = |list: [&'static str; 64], index: u8| list[usize::from(index) % list.len()];
    let name = format!("{}-{}", pick(QUALITIES, quality), pick(THINGS, thing));
    if !taken(&name) {
        return name;
    }
    // Every name can only be taken if as many machines exist as there are numbers.
    let mut number = u32::from(u16::from_be_bytes([high, low]));
    loop {
        let numbered = format!("{name}-{number}");
        if !taken(&numbered) {
            return numbered;
        }
        number += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_name_gets_a_number_and_every_name_is_valid() {
        let first = made_up_name([0; 4], |_| false);
        let second = made_up_name([0; 4], |name| name == first);
        assert_ne!(first, second);
        for index in 0..=255u8 {
            let name = made_up_name([index, index, 0, 0], |name| !name.ends_with("-0"));
            assert!(name.parse::<vistara_model::MachineName>().is_ok(), "{name}");
        }
    }
}
