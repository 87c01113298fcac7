//! The network namespace that is only the process's own: looked at before, once more inside the freeze, and silent here as soon
//! as the destination's speaks.

use super::stop::{Result, Stop};
use crate::request::{Joint, JointKind, Request};
use godwit_kernel::stub::INIT_NAME;
use godwit_network::contents::{self, Reader};
use godwit_network::{Flow, Namespace, Silence};
use godwit_proto::wire::{NetworkJoint, NetworkNamespace, network_joint};
use godwit_resources::Obstacle;
use std::fs;
use std::net::IpAddr;

/// The process's own network namespace.
#[derive(Debug)]
pub(super) struct OwnNetwork {
    namespace: Namespace,
    reader: Reader,
    contents: NetworkNamespace,
    joints: Vec<NetworkJoint>,
    /// Connections that its packet filter tracks, as they were just before the freeze.
    tracked: Vec<Vec<u8>>,
    silence: Option<Silence>,
}

fn message(joint: &Joint) -> NetworkJoint {
    let (kind, name) = match &joint.kind {
        JointKind::Veth(bridge) => (network_joint::Kind::Veth, bridge),
        JointKind::Macvlan(device) => (network_joint::Kind::Macvlan, device),
        JointKind::Namespace(name) => (network_joint::Kind::Namespace, name),
    };
    NetworkJoint { kind: kind.into(), name: name.clone(), interface: joint.interface.clone().unwrap_or_default() }
}

/// Other processes in a network namespace, as text.
fn others_in(namespace: &Namespace, pid: i32) -> Vec<String> {
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let name = |pid: &i32| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned();
    let others = pids.filter(|&other| other != pid && namespace.is_of(other) && !waits_for(other, pid));
    others.map(|pid| format!("process {pid}, {}", name(&pid))).collect()
}

/// Whether a process is the init that was made for another one's PID namespace when that came here: it does nothing but wait for its end.
fn waits_for(init: i32, pid: i32) -> bool {
    let line = |pid: i32, name: &str| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let value = status.lines().find_map(|line| line.strip_prefix(name).map(|value| value.trim().to_owned()));
        value.unwrap_or_default()
    };
    line(init, "Name:").as_bytes() == INIT_NAME.to_bytes()
        && line(init, "NSpid:").split_whitespace().next_back() == Some("1")
        && line(pid, "PPid:") == init.to_string()
}

/// Whether a thread of the process is in another network namespace than its leader.
fn has_stray_thread(namespace: &Namespace, pid: i32) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let mut tids = threads.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    // N.B. in this order: one that ends meanwhile is in none.
    tids.any(|tid| !namespace.is_of(tid) && fs::metadata(format!("/proc/{tid}/ns/net")).is_ok())
}

impl OwnNetwork {
    /// Looks at the network namespace of the process, if it is another one than that of this program. `tun_files` are the names of
    /// interfaces whose other ends it has.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    pub(super) fn look_at(
        request: &Request,
        tun_files: &[String],
        obstacles: &mut Vec<Obstacle>,
    ) -> Result<Option<Self>> {
        let (pid, name) = (request.pid, format!("process {}", request.pid));
        let namespace = Namespace::of_process(pid)?;
        if has_stray_thread(&namespace, pid) {
            obstacles.push(Obstacle::new(&name, "its threads are in different network namespaces", ""));
        }
        if namespace.is(&Namespace::current()?) {
            if !request.joints.is_empty() {
                let text = "it has no network namespace of its own";
                obstacles.push(Obstacle::new(
                    &name,
                    text,
                    "leave --net out; --move-addr has an address of this host move along",
                ));
            }
            return Ok(None);
        }
        let others = others_in(&namespace, pid);
        if !others.is_empty() {
            let text = format!("shares its network namespace with others that stay behind ({})", others.join("; "));
            let remedy = format!(
                "run this program there, if the destination's page server is in one alike: nsenter --target {pid} --net"
            );
            obstacles.push(Obstacle::new(&name, text, remedy));
        }
        if !request.move_addresses.is_empty() {
            let text = "it has a network namespace of its own, whose addresses move along anyway";
            obstacles.push(Obstacle::new(&name, text, "leave --move-addr out"));
        }
        let contents = contents::read(&namespace)?;
        let joints: Vec<NetworkJoint> = request.joints.iter().map(message).collect();
        let objections = contents::objections(pid, &contents, &joints, tun_files);
        obstacles.extend(objections.into_iter().map(|one| Obstacle::new(one.resource, one.text, one.remedy)));
        let reader = Reader::new(&namespace)?;
        Ok(Some(Self { namespace, reader, contents, joints, tracked: Vec::new(), silence: None }))
    }

    /// Whether one was prepared at the destination.
    pub(super) fn is_prepared(&self) -> bool {
        self.joints.iter().any(|joint| joint.kind() == network_joint::Kind::Namespace)
    }

    /// How the destination shall join it to its network.
    pub(super) fn joints(&self) -> Vec<NetworkJoint> {
        self.joints.clone()
    }

    /// What the destination is to make of it.
    pub(super) fn contents(&self) -> &NetworkNamespace {
        &self.contents
    }

    /// The namespace itself.
    pub(super) fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Its addresses.
    pub(super) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        contents::addresses(&self.contents).into_iter()
    }

    /// Lists what is tracked, just before the freeze: inside it there is no time for all.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    pub(super) fn list_tracked(&mut self) -> Result<()> {
        if !self.is_prepared() {
            self.tracked = self.reader.tracked()?;
        }
        Ok(())
    }

    /// Looks once more, with the process stopped, which has these connections.
    ///
    /// # Errors
    /// When interfaces have changed, which nothing is prepared for.
    pub(super) fn look_again<'a>(&mut self, flows: impl Iterator<Item = &'a Flow>) -> Result<NetworkNamespace> {
        let mut now = self.reader.read()?;
        if !self.is_prepared() {
            self.reader.add_tracked(&mut self.tracked, flows);
        }
        now.tracked = std::mem::take(&mut self.tracked);
        if contents::links_differ(&self.contents, &now) {
            let text = "its interfaces have changed since they were looked at";
            return Err(Stop::with_remedy("network namespace", text, "try again"));
        }
        Ok(now)
    }

    /// Has it say nothing any more, whatever becomes of this program: its addresses are about to be somewhere else.
    ///
    /// # Errors
    /// When the packet filter refuses.
    pub(super) fn silence(&mut self, id: &str) -> Result<()> {
        self.silence = Some(Silence::impose_for_good(&self.namespace, &format!("moved-{id}"))?);
        Ok(())
    }

    /// The name of the tables by which it is silent, if it is.
    pub(super) fn silent_by(&self) -> Option<&str> {
        self.silence.as_ref().map(Silence::table)
    }

    /// Lets it speak again: nothing has moved.
    ///
    /// # Errors
    /// When the packet filter refuses.
    pub(super) fn speak(&mut self) -> godwit_network::Result<()> {
        self.silence.take().map_or(Ok(()), |silence| silence.end())
    }

    /// Cuts it off from the network: somebody else may keep it when the process has gone.
    ///
    /// # Errors
    /// When an interface does not go down; it stays silent then.
    pub(super) fn cut_off(&mut self) -> godwit_network::Result<()> {
        contents::take_down(&self.namespace)?;
        self.speak()
    }
}
