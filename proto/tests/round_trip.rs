//! Encodings that other readers of the same messages rely on, and what broken ones do.

use godwit_proto::image::{CoreEntry, FdTypes, FileEntry, RegFileEntry, RlimitEntry, VmaEntry, core_entry::March};
use godwit_proto::wire::{Final, Hello, MessageType, Role, SharedObject, shared_object::Kind};
use godwit_proto::{Message, Typed};

#[test]
fn required_fields_are_written_even_when_zero() {
    let limit = RlimitEntry { cur: 0, max: 300 };
    assert_eq!(limit.encode_to_vec(), [0x08, 0x00, 0x10, 0xac, 0x02]);
}

#[test]
fn fields_of_our_own_are_numbered_from_10000() {
    let named = VmaEntry { name: Some("x".into()), ..VmaEntry::default() }.encode_to_vec();
    // Key of field 10001, length-delimited: 10001 << 3 | 2 as a varint, then one byte.
    assert!(named.ends_with(&[0x8a, 0xf1, 0x04, 1, b'x']));
}

#[test]
fn absent_fields_read_as_their_schema_defaults() {
    assert_eq!(RegFileEntry::default().mnt_id(), -1);
    assert!(godwit_proto::image::UserDescT::default().read_exec_only);
}

#[test]
fn state_survives_a_final_message() -> Result<(), godwit_proto::DecodeError> {
    let file = FileEntry { r#type: FdTypes::Timerfd.into(), id: 7, ..FileEntry::default() };
    let sent = Final {
        leader: Some(CoreEntry { mtype: March::X8664.into(), ..CoreEntry::default() }),
        tids: vec![1, 2],
        files: vec![file],
        objects: vec![SharedObject { number: 3, kind: Kind::Sysv.into(), sysv_key: -1, ..SharedObject::default() }],
        ..Final::default()
    };
    assert_eq!(Final::decode(sent.encode_to_vec().as_slice())?, sent);
    Ok(())
}

#[test]
fn every_cut_of_a_message_is_an_error_or_a_message() {
    let hello = Hello { migration_id: vec![7; 16], role: Role::Drain.into(), ..Hello::default() }.encode_to_vec();
    for end in 0..hello.len() {
        // Nothing to compare: only a panic would be wrong.
        let _ = Hello::decode(&hello[..end]);
    }
    // A length that reaches far beyond the end must not become an allocation.
    assert!(Hello::decode([0x1a, 0xff, 0xff, 0xff, 0xff, 0x07].as_slice()).is_err());
}

#[test]
fn messages_know_their_numbers() {
    assert_eq!(Hello::TYPE, MessageType::Hello);
    assert_eq!(MessageType::try_from(13), Ok(MessageType::Final));
    assert!(MessageType::try_from(999).is_err());
}
