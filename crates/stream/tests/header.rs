//! The header codec: everything valid survives, nothing hostile gets through or panics.

use godwit_stream::*;
use proptest::prelude::*;

fn message() -> impl Strategy<Value = FrameHeader> {
    (any::<u32>(), any::<u64>(), 0..=Limits::MESSAGE_BYTES as u32, application_flags(), any::<Option<u64>>()).prop_map(
        |(message_type, id, length, flags, sum)| {
            checksummed(FrameHeader { flags, ..FrameHeader::message(message_type, id, length) }, sum)
        },
    )
}

fn pages() -> impl Strategy<Value = FrameHeader> {
    let count = 1..=Limits::FRAME_PAGES;
    let page = 0..=(u64::MAX / PAGE_SIZE as u64 - u64::from(Limits::FRAME_PAGES));
    (any::<u32>(), page, count, any::<u64>(), 0..3_u8, application_flags(), any::<Option<u64>>(), any::<u32>())
        .prop_map(|(space, page, count, id, encoding, flags, sum, length)| {
            let raw = FrameHeader::raw_pages(space, page * PAGE_SIZE as u64, count, id);
            let header = FrameHeader { encoding, flags, ..raw };
            match encoding {
                ENCODING_RAW => checksummed(header, sum),
                ENCODING_ZERO => FrameHeader { length: 0, ..header },
                _ => checksummed(FrameHeader { length: 1 + length % (raw.length - 1), ..header }, sum),
            }
        })
}

fn application_flags() -> impl Strategy<Value = u16> {
    any::<u16>().prop_map(|flags| flags & FLAGS_APPLICATION)
}

fn checksummed(header: FrameHeader, sum: Option<u64>) -> FrameHeader {
    match sum {
        Some(checksum) => FrameHeader { flags: header.flags | FLAG_CHECKSUM, checksum, ..header },
        None => header,
    }
}

/// Field by field at random, but each near the values that are allowed.
fn nearly() -> impl Strategy<Value = FrameHeader> {
    let small = prop_oneof![Just(0), Just(1), Just(511), Just(512), Just(513), any::<u32>()];
    let length = prop_oneof![
        Just(0),
        Just(4096),
        Just(512 * 4096),
        Just(Limits::MESSAGE_BYTES as u32),
        Just(Limits::MESSAGE_BYTES as u32 + 1),
        any::<u32>()
    ];
    let address = prop_oneof![Just(0), Just(4096), Just(u64::MAX), Just(u64::MAX - 4095), any::<u64>()];
    let sum = prop_oneof![Just(0), any::<u64>()];
    (0..4_u8, 0..4_u8, any::<u16>(), any::<u32>(), address, small, length, sum, any::<u64>()).prop_map(
        |(kind, encoding, flags, space, address, pages, length, checksum, id)| FrameHeader {
            kind,
            encoding,
            flags: flags & 0xff03,
            space,
            address,
            pages,
            length,
            checksum,
            id,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn valid_headers_survive(header in prop_oneof![message(), pages()], tail in any::<Vec<u8>>()) {
        let bytes = header.encode().unwrap();
        prop_assert_eq!(bytes.len(), HEADER_SIZE);
        prop_assert_eq!(FrameHeader::decode(&bytes).unwrap(), header);
        let mut longer = bytes.to_vec();
        longer.extend(tail);
        prop_assert_eq!(FrameHeader::decode(&longer).unwrap(), header);
    }

    #[test]
    fn any_bytes_are_an_error_or_the_header_they_spell(bytes in any::<[u8; HEADER_SIZE]>()) {
        if let Ok(header) = FrameHeader::decode(&bytes) {
            prop_assert_eq!(header.encode().unwrap(), bytes);
        }
    }

    #[test]
    fn both_directions_agree_on_what_is_valid(header in nearly()) {
        let valid = header.validate().is_ok();
        prop_assert_eq!(header.encode().is_ok(), valid);
        if valid {
            let most = match header.kind {
                KIND_MESSAGE => Limits::MESSAGE_BYTES,
                _ => Limits::FRAME_BYTES,
            };
            prop_assert!(header.length as usize <= most);
            prop_assert!(header.page_bytes() <= Limits::FRAME_BYTES);
        }
    }

    #[test]
    fn a_flipped_bit_is_seen_or_changes_one_field(header in prop_oneof![message(), pages()], bit in 0..HEADER_SIZE * 8) {
        let mut bytes = header.encode().unwrap();
        bytes[bit / 8] ^= 1 << (bit % 8);
        if let Ok(other) = FrameHeader::decode(&bytes) {
            prop_assert_ne!(other, header);
        }
    }

    #[test]
    fn short_headers_are_refused(header in pages(), length in 0..HEADER_SIZE) {
        prop_assert!(FrameHeader::decode(&header.encode().unwrap()[..length]).is_err());
    }
}

#[test]
fn the_layout_is_the_documented_one() {
    let header = FrameHeader {
        kind: KIND_PAGES,
        encoding: ENCODING_ZSTD,
        flags: FLAG_CHECKSUM | 0x0200,
        space: 0x0403_0201,
        address: 0x7fff_1234_5000,
        pages: 2,
        length: 0x1001,
        checksum: 0x1122_3344_5566_7788,
        id: 0x99,
    };
    let expected = [
        2, 2, 1, 2, // kind, encoding, flags
        1, 2, 3, 4, // space
        0x00, 0x50, 0x34, 0x12, 0xff, 0x7f, 0, 0, // address
        2, 0, 0, 0, // pages
        1, 0x10, 0, 0, // length
        0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, // checksum
        0x99, 0, 0, 0, 0, 0, 0, 0, // id
    ];
    assert_eq!(header.encode().unwrap(), expected);
}

#[test]
fn each_broken_field_is_named() {
    let page = FrameHeader::raw_pages(0, 0x1000, 1, 0);
    let broken = |header: FrameHeader| header.validate().unwrap_err();
    assert!(matches!(broken(FrameHeader { kind: 0, ..page }), Error::Kind(0)));
    assert!(matches!(broken(FrameHeader { kind: 9, ..page }), Error::Kind(9)));
    assert!(matches!(broken(FrameHeader { encoding: 3, ..page }), Error::Encoding { encoding: 3, .. }));
    assert!(matches!(broken(FrameHeader { flags: 2, ..page }), Error::Flags(2)));
    assert!(matches!(broken(FrameHeader { checksum: 1, ..page }), Error::StrayChecksum(1)));
    assert!(matches!(broken(FrameHeader { pages: 0, ..page }), Error::Pages { pages: 0, .. }));
    assert!(matches!(broken(FrameHeader { pages: 513, ..page }), Error::Pages { pages: 513, .. }));
    assert!(matches!(broken(FrameHeader { address: 1, ..page }), Error::Address { address: 1, .. }));
    assert!(matches!(broken(FrameHeader { address: !4095, ..page }), Error::Address { .. }));
    assert!(matches!(broken(FrameHeader { length: 4095, ..page }), Error::Length { length: 4095, .. }));
    let message = FrameHeader::message(1, 2, 3);
    assert!(matches!(broken(FrameHeader { pages: 1, ..message }), Error::Pages { .. }));
    assert!(matches!(broken(FrameHeader { address: 4096, ..message }), Error::Address { .. }));
    assert!(matches!(broken(FrameHeader { length: (16 << 20) + 1, ..message }), Error::Length { .. }));
    assert!(matches!(broken(FrameHeader { encoding: ENCODING_ZERO, ..message }), Error::Encoding { .. }));
}
