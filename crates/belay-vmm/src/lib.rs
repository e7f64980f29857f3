//! VMM driver: QMP, VM specifications, QEMU command lines
