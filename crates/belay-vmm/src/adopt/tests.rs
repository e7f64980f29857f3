use super::*;

const LINE: &str = "-name web -machine q35,accel=kvm:tcg,memory-backend=mem0,vmport=off -m 64M -smp 2 -nodefaults \
    -object memory-backend-memfd,id=mem0,share=on,size=64M -daemonize -display gtk \
    -qmp unix:/run/web.qmp,server,nowait -qmp unix:/run/other.qmp,server=on,wait=off \
    -chardev socket,id=c0,path=/run/belay/devices/root.sock,reconnect=1 \
    -device vhost-user-blk-pci,id=disk-a,chardev=c0,num-queues=2,addr=0x5 \
    -serial file:/run/belay/web.serial -chardev socket,id=con,path=/tmp/con,server=on,wait=off -pidfile /run/web.pid \
    -kernel vmlinuz -append a=b,c -cdrom /iso/x.iso -S -L /opt/qemu/share -runas nobody -incoming defer";

fn adopt_with(line: &str, by_name: &[String], plugged: &[&str]) -> Result<VmSpec, Refusal> {
    let arguments: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
    let sockets = [DiskPlug { device: "root".into(), socket: "/run/belay/devices/root.sock".into() }];
    let plugged = plugged.iter().map(|id| (*id).to_owned()).collect();
    let resolve = |path: &Path| Path::new("/home/me").join(path);
    let running = Running {
        name: "web",
        arguments: &arguments,
        machine: "pc-q35-7.2",
        kvm: false,
        memory_mib: 64,
        cpus: 2,
        plugged: &plugged,
        qmp: Path::new("/run/web.qmp"),
        runtime_dir: Path::new("/run/belay"),
        sockets: &sockets,
        by_name,
        resolve: &resolve,
    };
    specification(&running)
}

fn adopt(line: &str) -> Result<VmSpec, Refusal> {
    adopt_with(line, &[], &["disk-a"])
}

#[test]
fn only_what_belongs_to_this_host_is_replaced() {
    let spec = adopt(LINE).unwrap();
    assert_eq!(spec.disks.len(), 1);
    assert_eq!(spec.disks[0].device, "root");
    let adopted = spec.adopted.unwrap();
    let expected = "-machine pc-q35-7.2,memory-backend=mem0,vmport=off -accel tcg -name web -m 64M -smp 2 -nodefaults \
        -object memory-backend-memfd,id=mem0,share=on,size=64M -display none \
        -qmp unix:{runtime_dir}/vms/web.d/other.qmp,server=on,wait=off -chardev socket,id=c0,{socket:root} \
        -device vhost-user-blk-pci,id=disk-a,chardev=c0,num-queues=2,addr=0x5 -serial file:{runtime_dir}/web.serial \
        -chardev socket,id=con,path={runtime_dir}/vms/web.d/con,server=on,wait=off \
        -pidfile {runtime_dir}/vms/web.d/web.pid -kernel /home/me/vmlinuz -append a=b,c -cdrom /iso/x.iso";
    let expected: Vec<&str> = expected.split_whitespace().collect();
    assert_eq!(adopted.arguments, expected);
    assert_eq!(adopted.needs, [PathBuf::from("/home/me/vmlinuz"), "/iso/x.iso".into()]);
}

#[test]
fn monitor_of_two_options_is_left_out_when_it_is_ours() {
    let line = LINE.replace(
        "-qmp unix:/run/web.qmp,server,nowait",
        "-chardev socket,id=m,path=/run/web.qmp,server=on -mon chardev=m,mode=control",
    );
    let spec = adopt(&line).unwrap();
    assert_eq!(spec.adopted, adopt(LINE).unwrap().adopted);
}

#[test]
fn device_is_found_by_the_name_of_its_socket_if_it_is_named() {
    let line = LINE.replace("/run/belay/devices/root.sock", "/jail/root.sock");
    assert!(matches!(adopt(&line), Err(Refusal::OtherBackend { .. })));
    let named = ["root".to_owned()];
    let spec = adopt_with(&line, &named, &["disk-a"]).unwrap();
    assert_eq!(spec.disks[0].device, "root");
}

#[test]
fn what_cannot_be_at_another_host_is_refused() {
    let disk = |option: &str, file: &str| Refusal::LocalDisk { option: option.into(), file: file.into() };
    let inherited = |option: &str| Refusal::Inherited { option: option.into() };
    let device = |what: &str| Refusal::HostDevice { option: "-device vfio-pci".into(), what: what.into() };
    let cases = [
        ("-drive if=virtio,format=raw,file=/x.img", disk("-drive", "/x.img")),
        ("-hda /x.img", disk("-hda", "/x.img")),
        ("/x.img", disk("", "/x.img")),
        ("-blockdev driver=file,node-name=n,filename=/x.img", disk("-blockdev", "/x.img")),
        (r#"-blockdev {"driver":"raw","file":{"driver":"file","filename":"/x"}}"#, disk("-blockdev", "/x")),
        ("-netdev tap,id=n,fd=27", inherited("-netdev")),
        ("-chardev socket,id=x,fd=7,server=on", inherited("-chardev")),
        ("-device vfio-pci,host=01:00.0", device("01:00.0")),
        ("-readconfig /etc/vm.cfg", Refusal::OptionsElsewhere("-readconfig".into())),
        ("-mem-path /dev/hugepages", Refusal::MemoryNotShared),
        (
            "-chardev socket,id=v,path=/run/fs.sock -device vhost-user-fs-pci,chardev=v,tag=t",
            Refusal::OtherBackend { device: "vhost-user-fs-pci".into(), path: "/run/fs.sock".into() },
        ),
        ("-device virtio-rng-pci,id=rng", Refusal::Unplugged("rng".into())),
    ];
    for (more, expected) in cases {
        assert_eq!(adopt(&format!("{LINE} {more}")), Err(expected), "{more}");
    }
    for fine in ["-drive file=nbd://h/x", "-drive file=/x.iso,media=cdrom", "-device virtio-rng-pci"] {
        assert!(adopt(&format!("{LINE} {fine}")).is_ok(), "{fine}");
    }
}

#[test]
fn memory_that_is_not_shared_is_refused() {
    for (from, to) in [(",share=on", ",share=off"), (",memory-backend=mem0", "")] {
        assert_eq!(adopt(&LINE.replace(from, to)), Err(Refusal::MemoryNotShared), "{to}");
    }
    assert!(adopt(&LINE.replace(",share=on", "")).is_ok(), "a memfd is shared by itself");
    let file =
        LINE.replace("memory-backend-memfd,id=mem0,share=on", "memory-backend-file,mem-path=/m,id=mem0");
    assert_eq!(adopt(&file), Err(Refusal::MemoryNotShared));
}

#[test]
fn devices_plugged_in_later_and_vms_without_a_device_are_refused() {
    let outcome = adopt_with(LINE, &[], &["disk-a", "new"]);
    assert_eq!(outcome, Err(Refusal::PluggedLater("new".into())));
    let bare = "-machine q35,memory-backend=mem0 -object memory-backend-memfd,id=mem0,size=64M";
    assert_eq!(adopt_with(bare, &[], &[]), Err(Refusal::NoDevice));
}
