//! Text of /proc that is read by the crate for stopped processes.

use crate::targets::Decoder;
/// Its decoders, by name.
pub(crate) const ALL: &[(&str, Decoder)] = &[
    ("proc-maps", |bytes| godwit_tracee::parse_maps(bytes).map_or(0, |areas| 1 + areas.len())),
    ("proc-status", |bytes| {
        let status = godwit_tracee::parse_status(bytes);
        let numbers = ["Uid", "Gid", "NSpid", "Groups"].map(|field| status.numbers(field).len());
        let masks = ["SigQ", "CapEff", "ShdPnd"].map(|field| usize::from(status.hexadecimal(field).is_some()));
        let umask = usize::from(status.octal("Umask").is_some()) + usize::from(status.state() != '?');
        numbers.into_iter().chain(masks).sum::<usize>() + umask + usize::from(status.number("Pid").is_some())
    }),
];
