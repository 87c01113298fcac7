//! Socket options that many connections have alike are told once, and by a number from then on.

use super::socket_options::Packed;
use godwit_proto::wire::OptionSet;
use std::collections::HashMap;
use std::sync::Arc;

/// Option sets by the numbers that they were told under.
#[derive(Clone, Debug, Default)]
pub(crate) struct OptionSets {
    numbers: HashMap<Arc<Packed>, u32>,
    /// The one asked for last: most connections have the same.
    last: Option<(Arc<Packed>, u32)>,
}

impl OptionSets {
    /// The number of a set; a new one is added to those that are to be told.
    pub(crate) fn number(&mut self, options: &Arc<Packed>, new: &mut Vec<OptionSet>) -> u32 {
        if let Some((same, number)) = &self.last
            && Arc::ptr_eq(same, options)
        {
            return *number;
        }
        let next = self.numbers.len() as u32;
        let number = *self.numbers.entry(Arc::clone(options)).or_insert_with_key(|options| {
            new.push(OptionSet { options: options.unpack() });
            next
        });
        self.last = Some((Arc::clone(options), number));
        number
    }
}
