//! Pages through encoder and decoder, and payloads that lie.

use bytes::Bytes;
use godwit_stream::*;
use proptest::prelude::*;

/// What one page of a buffer holds.
#[derive(Debug, Clone, Copy)]
enum Content {
    Zero,
    Text(u8),
    Noise(u64),
}

fn content() -> impl Strategy<Value = Content> {
    prop_oneof![Just(Content::Zero), any::<u8>().prop_map(Content::Text), any::<u64>().prop_map(Content::Noise)]
}

fn noise(seed: u64) -> impl Iterator<Item = u8> {
    let mut state = seed | 1;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    })
}

fn fill(contents: &[Content]) -> Vec<u8> {
    let page = |content: &Content| -> Vec<u8> {
        match *content {
            Content::Zero => vec![0; PAGE_SIZE],
            Content::Text(seed) => (0..PAGE_SIZE).map(|at| seed.wrapping_add((at / 64) as u8)).collect(),
            Content::Noise(seed) => noise(seed).take(PAGE_SIZE).collect(),
        }
    };
    contents.iter().flat_map(page).collect()
}

fn decode_all(frames: Vec<EncodedFrame>, space: u32, address: u64, id: u64) -> Vec<u8> {
    let mut scratch = Scratch::new();
    let mut pages = Vec::new();
    for (header, payload) in frames {
        let header = FrameHeader::decode(&header.encode().unwrap()).unwrap();
        assert_eq!((header.space, header.id), (space, id));
        assert_eq!(header.address, address + pages.len() as u64);
        let zero = header.encoding == ENCODING_ZERO;
        assert_eq!(payload.is_none(), zero);
        let decoded = decode_pages(&header, payload.unwrap_or_default(), &mut scratch).unwrap();
        assert_eq!(is_zero(&decoded), zero);
        pages.extend_from_slice(&decoded);
    }
    pages
}

fn compressions() -> impl Strategy<Value = Compression> {
    prop_oneof![Just(Compression::Off), (-7..4).prop_map(Compression::Level), Just(Compression::Adaptive)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn pages_survive(
        contents in prop::collection::vec((content(), 1..40_usize), 0..12),
        compression in compressions(),
        link in 1e5..1e10_f64,
        every in any::<bool>(),
    ) {
        let contents: Vec<Content> = contents.into_iter().flat_map(|(content, times)| vec![content; times]).collect();
        let pages = fill(&contents);
        let policy = if every { ChecksumPolicy::Every } else { ChecksumPolicy::Compressed };
        let mut encoder = PageEncoder::new(compression).with_checksums(policy);
        encoder.observe(link, 1.0);
        let frames = encoder.encode(3, 0x7000_0000, &pages, 9);
        for (header, payload) in &frames {
            prop_assert_eq!(header.has_checksum(), payload.is_some() && (every || header.encoding == ENCODING_ZSTD));
        }
        prop_assert!(decode_all(frames, 3, 0x7000_0000, 9) == pages);
        let tally = encoder.tally();
        prop_assert_eq!(tally.zero_pages + tally.raw_pages + tally.zstd_pages, contents.len() as u64);
        let shared = encoder.encode_shared(3, 0x7000_0000, &Bytes::from(pages.clone()), 9);
        prop_assert!(decode_all(shared, 3, 0x7000_0000, 9) == pages);
    }

    #[test]
    fn damaged_frames_are_noticed(at in any::<prop::sample::Index>(), bit in 0..8_u8) {
        let mut encoder = PageEncoder::new(Compression::Level(1));
        let (header, payload) = encoder.encode(0, 0, &fill(&[Content::Text(1); 16]), 0).remove(0);
        let mut payload = payload.unwrap().to_vec();
        let at = at.index(payload.len());
        payload[at] ^= 1 << bit;
        let refused = decode_pages(&header, payload.clone().into(), &mut Scratch::new());
        let noticed = matches!(refused, Err(Error::Checksum { .. }));
        prop_assert!(noticed);
        // Without the checksum zstd is on its own: it may be fooled about content, never about size.
        let unchecked = FrameHeader { flags: 0, checksum: 0, ..header };
        if let Ok(decoded) = decode_pages(&unchecked, payload.into(), &mut Scratch::new()) {
            prop_assert_eq!(decoded.len(), header.page_bytes());
        }
    }
}

#[test]
fn zero_runs_are_split_off_and_long_runs_cut() {
    let mut contents = vec![Content::Noise(5); 3];
    contents.extend([Content::Zero; 1200]);
    contents.extend([Content::Noise(6); 600]);
    let frames = PageEncoder::new(Compression::Off).encode(0, 0x1000, &fill(&contents), 0);
    let shape: Vec<(u8, u32)> = frames.iter().map(|(header, _)| (header.encoding, header.pages)).collect();
    assert_eq!(shape, [(0, 3), (1, 512), (1, 512), (1, 176), (0, 512), (0, 88)]);
}

#[test]
fn a_bomb_is_stopped_at_the_promised_size() {
    let bomb = zstd::bulk::compress(&vec![7; 64 << 20], 19).unwrap();
    assert!(bomb.len() < 8192);
    let header =
        FrameHeader { encoding: ENCODING_ZSTD, length: bomb.len() as u32, ..FrameHeader::raw_pages(0, 0, 2, 0) };
    let header = FrameHeader { pages: 4, ..header };
    let refused = decode_pages(&header, bomb.into(), &mut Scratch::new());
    assert!(matches!(refused, Err(Error::Inflate { expected: 16384, .. })), "{refused:?}");
}

#[test]
fn too_little_out_of_zstd_is_refused() {
    let small = zstd::bulk::compress(&vec![7; PAGE_SIZE], 1).unwrap();
    let header =
        FrameHeader { encoding: ENCODING_ZSTD, length: small.len() as u32, ..FrameHeader::raw_pages(0, 0, 2, 0) };
    let refused = decode_pages(&header, small.into(), &mut Scratch::new());
    assert!(matches!(refused, Err(Error::Inflate { .. })), "{refused:?}");
}

#[test]
fn lengths_and_kinds_are_checked() {
    let mut scratch = Scratch::new();
    let header = FrameHeader::raw_pages(0, 0, 1, 0);
    let short = decode_pages(&header, Bytes::from_static(&[1; 100]), &mut scratch);
    assert!(matches!(short, Err(Error::PayloadLength { expected: 4096, actual: 100 })));
    let message = FrameHeader::message(1, 1, 3).with_checksum(b"abc");
    assert_eq!(decode_message(&message, Bytes::from_static(b"abc")).unwrap(), "abc");
    assert!(matches!(decode_message(&message, Bytes::from_static(b"abd")), Err(Error::Checksum { .. })));
    let wrong = decode_pages(&message, Bytes::from_static(b"abc"), &mut scratch);
    assert!(matches!(wrong, Err(Error::WrongKind { expected: KIND_PAGES, actual: KIND_MESSAGE })));
    let hostile = FrameHeader { length: u32::MAX, ..header };
    assert!(decode_pages(&hostile, Bytes::new(), &mut scratch).is_err());
}

#[test]
fn adaptive_leaves_noise_alone_and_squeezes_text() {
    let mut encoder = PageEncoder::new(Compression::Adaptive);
    encoder.observe(50e6, 1.0);
    let noise: Vec<u8> = noise(77).take(256 * PAGE_SIZE).collect();
    let text = fill(&[Content::Text(9); 256]);
    for _ in 0..20 {
        assert!(encoder.encode(0, 0, &noise, 0).iter().all(|(header, _)| header.encoding == ENCODING_RAW));
    }
    // After the failures text is passed over for a while, then it is noticed.
    for _ in 0..100 {
        encoder.encode(0, 0, &text, 0);
    }
    assert!(encoder.tally().zstd_pages > 256 * 50);
}

#[test]
fn scratch_memory_comes_back() {
    let pages = fill(&[Content::Text(3); 256]);
    let mut encoder = PageEncoder::new(Compression::Level(1));
    let mut scratch = Scratch::new();
    let mut places = std::collections::HashSet::new();
    for _ in 0..50 {
        let (header, payload) = encoder.encode(0, 0, &pages, 0).remove(0);
        let decoded = decode_pages(&header, payload.unwrap(), &mut scratch).unwrap();
        assert!(decoded == pages);
        places.insert(decoded.as_ptr() as usize);
    }
    assert!(places.len() <= 4, "{} places", places.len());
}
