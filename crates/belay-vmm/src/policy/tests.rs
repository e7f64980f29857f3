use std::path::Path;

use super::*;
use crate::adopt::Adopted;

fn refused_with(allow: &[&str], arguments: &[&str]) -> Vec<Forbidden> {
    let allow: Vec<String> = allow.iter().map(|entry| (*entry).to_owned()).collect();
    let may_read = |path: &Path| path.starts_with("/usr/share");
    let policy = Policy { allow_args: &allow, may_read: &may_read };
    let mut spec = VmSpec::from_toml("name='web'\ndisks=[{device='root'}]").unwrap();
    spec.args = arguments.iter().map(|argument| (*argument).to_owned()).collect();
    let found = policy.forbidden(&spec);
    // The same of one that was adopted.
    spec.adopted = Some(Adopted { arguments: std::mem::take(&mut spec.args), needs: Vec::new() });
    assert_eq!(policy.forbidden(&spec), found);
    found
}

/// Options and values, separated by spaces.
fn refused(line: &str) -> Vec<Forbidden> {
    refused_with(&[], &line.split(' ').collect::<Vec<_>>())
}

#[test]
fn usual_vm_needs_no_word_of_the_operator() {
    for line in [
        "-nodefaults -no-reboot -nographic -enable-kvm -S",
        "-cpu host,+x2apic -smp 4,sockets=2 -m 2G -uuid 9a1d0bd2-0000-4000-8000-000000000001 -rtc base=utc,clock=host",
        "-machine pc-q35-7.2,accel=kvm,memory-backend=mem0 -accel tcg,thread=multi -name guest=web,debug-threads=on",
        "-object memory-backend-memfd,id=mem0,share=on,size=1G -object rng-random,id=r,filename=/dev/urandom",
        "-device virtio-rng-pci,rng=r -device pcie-root-port,id=p1,chassis=1 -device virtio-balloon-pci",
        "-netdev user,id=n0,hostfwd=tcp::2222-:22,net=10.0.2.0/24 -device virtio-net-pci,netdev=n0,romfile=,addr=0x2",
        "-nic user,model=virtio-net-pci -nic none",
        "-serial file:{runtime_dir}/web.log -serial unix:{runtime_dir}/web.console,server=on,wait=off",
        "-monitor unix:{runtime_dir}/web.hmp,server,nowait -qmp unix:{runtime_dir}/vms/web.d/q.sock,server=on,wait=off",
        "-chardev socket,id=c,path={runtime_dir}/web.sock,server=on,wait=off,logfile={runtime_dir}/web.txt",
        "-serial chardev:c -mon chardev=c,mode=control -pidfile {runtime_dir}/web.pid -serial mon:stdio -parallel none",
        "-chardev file,id=f,path={runtime_dir}/web.out -chardev null,id=x -chardev ringbuf,id=y,size=1024",
        "-drive if=pflash,format=raw,readonly=on,file=/usr/share/OVMF/OVMF_CODE.fd -drive if=none,id=cd,media=cdrom",
        "-cdrom /usr/share/iso/tools.iso -bios /usr/share/seabios/bios.bin -boot order=c,menu=on",
        "-blockdev driver=file,node-name=f,read-only=on,filename=/usr/share/x.img -blockdev driver=raw,node-name=r,file=f",
        "-smbios type=1,serial=ds=nocloud;s=http://a/ -fw_cfg name=opt/a/b,string=x -global ICH9-LPC.disable_s3=1",
        "-append console=ttyS0 -vga std -display none -device VGA -device usb-tablet -device qemu-xhci",
        "--device e1000e,netdev=n0 -audiodev none,id=a",
        r#"-device {"driver":"virtio-net-pci","netdev":"n0"}"#,
        "-chardev socket,id=c0,{socket:root} -device vhost-user-blk-pci,id=a,chardev=c0,num-queues=2",
    ] {
        assert_eq!(refused(line), [], "{line}");
    }
    // A kernel's command line is its own, whatever it looks like.
    assert_eq!(refused_with(&[], &["-append", "-drive file=/etc/shadow"]), []);
}

#[test]
fn what_reaches_this_host_is_refused() {
    for line in [
        // Files read.
        "-drive file=/etc/shadow",
        "-drive file=/etc/shadow,readonly=on",
        "-drive file=/usr/share/x.img",
        "-drive media=cdrom,readonly=off,file=/usr/share/x",
        "-drive file.filename=/etc/shadow,readonly=on",
        "-drive file=json:{},readonly=on",
        "-drive file=nbd://host/x,readonly=on",
        "-blockdev driver=file,node-name=f,filename=/usr/share/x",
        "-blockdev driver=host_device,node-name=f,filename=/dev/sda,read-only=on",
        r#"-blockdev {"driver":"raw","node-name":"r","file":{"driver":"file","filename":"/etc/shadow"}}"#,
        "-hda /etc/shadow",
        "-pflash /usr/share/x",
        "disk.img",
        "-cdrom /etc/shadow",
        "-cdrom shadow",
        "-bios bios.bin",
        "-kernel /etc/shadow",
        "-initrd /root/.ssh/id",
        "-option-rom /etc/shadow",
        "-acpitable file=/etc/shadow",
        "-smbios type=11,path=/etc/shadow",
        "-smbios file=/etc/shadow",
        "-fw_cfg name=opt/x,file=/etc/shadow",
        "-fw_cfg opt/x,file=/etc/shadow",
        "-boot splash=/etc/shadow",
        "-machine q35,kernel=/etc/shadow",
        "-device virtio-net-pci,romfile=/etc/shadow",
        "-device virtio-net-pci,romfile=shadow",
        "-global virtio-net-pci.romfile=/etc/shadow",
        "-global driver=virtio-net-pci,property=romfile,value=/etc/shadow",
        "-global driver=virtio-net-pci,property=romfile,value=shadow",
        "-device loader,file=/etc/shadow",
        "-device virtio-9p-pci,fsdev=f,mount_tag=t",
        "-device {'driver':'loader','file':'/etc/shadow'}",
        "-fsdev local,id=f,path=/,security_model=none",
        "-virtfs local,path=/,mount_tag=t,security_model=none",
        "-object memory-backend-file,id=m,mem-path=/dev/shm/x,size=1M",
        "-object secret,id=s,file=/etc/shadow",
        "-object rng-random,id=r,filename=/etc/shadow",
        "-object rng-random,id=r,filename=/dev/urandom,filename=/dev/sda",
        "-netdev user,id=n,tftp=/etc",
        "-netdev user,id=n,smb=/etc",
        "-readconfig /etc/shadow",
        "-semihosting",
        // Files written.
        "-serial file:/etc/cron.d/x",
        "-serial file:{runtime_dir}/agent.sock",
        "-serial file:{runtime_dir}/other.log",
        "-serial file:{runtime_dir}/web.a.log",
        "-serial file:{runtime_dir}/web./../../etc/x",
        "-serial file:{runtime_dir}/vms/web.log",
        "-serial file:{runtime_dir}/vms/web.d/../other.log",
        "-chardev file,id=c,path=/etc/x",
        "-chardev file,id=c,path={runtime_dir}/web.x,path=/etc/x",
        "-chardev null,id=c,logfile=/etc/x",
        "-chardev socket,id=c,path={runtime_dir}/devices/root.sock,server=on",
        "-chardev socket,id=c,path={runtime_dir}/agent.sock,server=on,wait=off",
        "-qmp unix:{runtime_dir}/agent.sock,server=on,wait=off",
        "-serial unix:{runtime_dir}/web.s,server=on,path=/etc/x",
        "-pidfile /etc/x",
        "-D /etc/x",
        "-trace file=/etc/x",
        "-machine q35,dumpdtb=/etc/x",
        "-audiodev wav,id=a,path=/etc/x",
        "-object filter-dump,id=f,netdev=n,file=/etc/x",
        "-icount shift=1,rr=record,rrfile=/etc/x",
        "-writeconfig /etc/x",
        // Programs, sockets and hardware of this host.
        "-netdev tap,id=n,script=/bin/sh",
        "-netdev user,id=n,guestfwd=tcp:10.0.2.100:80-cmd:/bin/sh",
        "-netdev user,type=tap,id=n",
        "-netdev bridge,id=n,br=br0",
        "-net tap",
        "-netdev socket,id=n,listen=:1234",
        "-incoming exec:sh",
        "-chardev socket,id=c,path={runtime_dir}/web.sock",
        "-chardev socket,id=c,path={runtime_dir}/web.sock,server=on,server=off",
        "-chardev socket,id=c,host=127.0.0.1,port=1",
        "-chardev pipe,id=c,path={runtime_dir}/web.x",
        "-chardev file,id=c,path={runtime_dir}/web.x,input-path={runtime_dir}/web.y",
        "-chardev socket,id=c,{socket:other}",
        "-chardev socket,id=c,{socket:root},path=/run/x",
        "-chardev serial,id=c,path=/dev/ttyS0",
        "-serial /dev/ttyS0",
        "-serial tcp:0.0.0.0:4444,server",
        "-serial unix:{runtime_dir}/web.s",
        "-monitor tcp:127.0.0.1:4444,server",
        "-gdb tcp::1234",
        "-vnc :0",
        "-spice port=1,disable-ticketing=on",
        "-display gtk",
        "-device vfio-pci,host=01:00.0",
        "-device usb-host,hostbus=1,hostaddr=2",
        "-device vhost-vsock-pci,guest-cid=3",
        "-device virtio-net-pci,driver=vfio-pci,sysfsdev=/sys/x",
        "-device virtio-input-host-pci,evdev=/dev/input/event0",
        "-device scsi-generic,drive=d",
        "-accel kvm,device=/dev/x",
        "-plugin /tmp/x.so",
        "-set device.d.romfile=/etc/shadow",
        "-runas root",
        "-run-with chroot=/",
        "-sandbox -daemonize",
        "-daemonize",
        "-add-fd fd=3,set=1",
        "-unheard of",
        "-m",
    ] {
        assert!(!refused(line).is_empty(), "{line}");
    }
    for line in
        ["-name -append -name -append -daemonize", "-nodefaults /etc/shadow", "-cpu --drive file=/etc/shadow"]
    {
        assert!(!refused(line).is_empty(), "{line}");
    }
}

#[test]
fn files_of_the_specification_are_in_the_operators_folders() {
    let may_read = |path: &Path| path.starts_with("/usr/share");
    let policy = Policy { allow_args: &[], may_read: &may_read };
    let spec = |file: &str| {
        VmSpec::from_toml(&format!("name='web'\nkernel='/usr/share/k'\ninitrd='{file}'")).unwrap()
    };
    assert_eq!(policy.forbidden(&spec("/usr/share/i")), []);
    let found = policy.forbidden(&spec("/etc/shadow"));
    assert_eq!(
        found.iter().map(Forbidden::to_string).collect::<Vec<_>>(),
        [
            "`initrd = \"/etc/shadow\"` may not be chosen by another host; `allow_paths = [\"/etc\"]` under [vmm] would allow it"
        ]
    );
}

#[test]
fn refusal_names_the_argument_and_the_entry_that_would_allow_it() {
    let tap = "-netdev tap,id=n,ifname=t0,script=no";
    let found = refused(tap);
    assert_eq!(
        found[0].to_string(),
        format!(
            "`{tap}` may not be chosen by another host; `allow_args = [\"-netdev tap\"]` under [vmm] would allow it"
        )
    );
    let cases = [
        (tap, "-netdev tap"),
        ("-device vfio-pci,host=1:0.0", "-device vfio-pci"),
        ("-vnc :0", "-vnc"),
        ("-daemonize", "-daemonize"),
        ("-cdrom /iso/x.iso", "/iso"),
        ("x.img", "*"),
    ];
    for (line, entry) in cases {
        assert_eq!(refused(line)[0].entry, entry, "{line}");
        if !entry.starts_with('/') {
            let words: Vec<&str> = line.split(' ').collect();
            assert_eq!(refused_with(&[entry], &words), [], "{line}");
        }
    }
}

#[test]
fn what_the_operator_names_is_allowed_and_nothing_else() {
    let words = |line: &'static str| line.split(' ').collect::<Vec<_>>();
    let tap = ["-netdev tap,id=*,ifname=belay*,script=no"];
    assert_eq!(refused_with(&tap, &words("-netdev tap,id=n,ifname=belay7,script=no")), []);
    for other in ["-netdev tap,id=n,ifname=eth0,script=no", "-netdev tap,id=n,x=y,ifname=belay7,script=no"] {
        assert_eq!(refused_with(&tap, &words(other)).len(), 1, "{other}");
    }
    assert_eq!(refused_with(&["-vnc"], &words("-vnc :0 -spice port=1")).len(), 1);
    assert_eq!(refused_with(&["*"], &words("-incoming exec:sh")), []);
    assert_eq!(refused_with(&[" --snapshot "], &words("-snapshot")), []);
    // Not hidden behind what is allowed.
    assert_eq!(refused_with(&["-snapshot"], &words("-snapshot /etc/shadow")).len(), 1);
    assert_eq!(refused_with(&["-newer"], &words("-newer -drive file=/x")).len(), 2);
}

#[test]
fn rules_agree_with_what_has_a_value() {
    for flag in WITHOUT_VALUE {
        assert!(matches!(Rule::of(flag), None | Some(Rule::Flag)), "{flag}");
    }
    for flag in ["-nodefaults", "-S", "-nographic", "-win2k-hack", "-usb", "-no-hpet", "-mem-prealloc"] {
        assert!(matches!(Rule::of(flag), Some(Rule::Flag)) && WITHOUT_VALUE.contains(&flag), "{flag}");
    }
}
