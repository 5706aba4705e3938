//! The table of fragments as an ordinary map.

use xdp_common::{
    fragment::{FragmentKey, FragmentPorts, FragmentTables, first},
    net::Family,
};

use super::Model;

impl<F: Family> FragmentTables<F> for &Model<F> {
    fn ports(self, key: &FragmentKey<F::Addr>) -> FragmentPorts {
        let unknown = FragmentPorts::without(first::UNKNOWN, 0);
        self.fragments.borrow().get(key).copied().unwrap_or(unknown)
    }

    fn set_ports(self, key: &FragmentKey<F::Addr>, ports: &FragmentPorts) {
        self.fragments.borrow_mut().insert(*key, *ports);
    }

    fn await_first(self, key: &FragmentKey<F::Addr>, ports: &FragmentPorts) {
        self.fragments.borrow_mut().entry(*key).or_insert(*ports);
    }
}
