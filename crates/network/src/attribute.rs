//! Attributes of netlink messages (netlink(7)): a length, a type, a value, padded to four bytes, one behind the other.

/// The bits of a type that say how the value is written.
const FLAGS: u16 = NESTED | 0x4000;
const NESTED: u16 = 0x8000;
/// Bytes before a value.
const HEADER: usize = 4;

/// Attributes of a message, appended to its bytes.
#[derive(Debug, Default)]
pub(crate) struct Attributes(pub(crate) Vec<u8>);

impl Attributes {
    pub(crate) fn bytes(&mut self, kind: u16, value: &[u8]) {
        self.0.extend(((HEADER + value.len()) as u16).to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    pub(crate) fn text(&mut self, kind: u16, value: &str) {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.bytes(kind, &bytes);
    }

    /// Numbers of netfilter are big-endian.
    pub(crate) fn number(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_be_bytes());
    }

    /// Those of rtnetlink(7) are the host's.
    pub(crate) fn native(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_ne_bytes());
    }

    pub(crate) fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        let start = self.0.len();
        self.0.extend([0; 2]);
        self.0.extend((kind | NESTED).to_ne_bytes());
        fill(self);
        let length = (self.0.len() - start) as u16;
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
    }

    /// Appends an attribute as it was read.
    pub(crate) fn copy(&mut self, attribute: &Attribute<'_>) {
        self.bytes(attribute.marked, attribute.value);
    }
}

/// One attribute of a message that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Attribute<'a> {
    /// Its type.
    pub(crate) kind: u16,
    /// Its type with the bits that say how the value is written.
    marked: u16,
    pub(crate) value: &'a [u8],
}

impl Attribute<'_> {
    /// A number in the host's order.
    pub(crate) fn native(&self) -> Option<u32> {
        self.value.get(..4)?.try_into().ok().map(u32::from_ne_bytes)
    }

    /// A text up to its end.
    pub(crate) fn text(&self) -> String {
        let end = self.value.iter().position(|&byte| byte == 0).unwrap_or(self.value.len());
        String::from_utf8_lossy(&self.value[..end]).into_owned()
    }
}

/// Reads attributes as long as they make sense.
pub(crate) fn read(mut bytes: &[u8]) -> impl Iterator<Item = Attribute<'_>> {
    std::iter::from_fn(move || {
        let word = |at: usize| bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes);
        let (length, marked) = (usize::from(word(0)?), word(2)?);
        let value = bytes.get(HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Attribute { kind: marked & !FLAGS, marked, value })
    })
}

/// The value of the first attribute of a type.
pub(crate) fn find(bytes: &[u8], kind: u16) -> Option<Attribute<'_>> {
    read(bytes).find(|attribute| attribute.kind == kind)
}

/// Attributes without those of some types.
pub(crate) fn without(bytes: &[u8], kinds: &[u16]) -> Vec<u8> {
    let mut kept = Attributes::default();
    read(bytes).filter(|attribute| !kinds.contains(&attribute.kind)).for_each(|attribute| kept.copy(&attribute));
    kept.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let mut written = Attributes::default();
        written.text(1, "ab");
        written.nested(2, |inner| inner.native(3, 7));
        assert_eq!(find(&written.0, 1).unwrap().text(), "ab");
        assert_eq!(find(find(&written.0, 2).unwrap().value, 3).unwrap().native(), Some(7));
        let rest = without(&written.0, &[1]);
        assert_eq!(read(&rest).map(|attribute| attribute.kind).collect::<Vec<_>>(), [2]);
        assert_eq!(without(&written.0, &[]), written.0);
    }
}
