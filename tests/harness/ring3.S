# The start of a guest written in C: boots by PVH and calls guest_main() in ring 3.
#
# Some hosts offer a KVM that runs only user mode at speed. So ring 0 only sets up long mode, and
# carries out reads and writes of I/O ports: ring 3 may not access them, and the handler of the
# fault (13) that it gets does so instead. Interrupts stay off.

        .section .note.pvh, "a", @note  # XEN_ELFNOTE_PHYS32_ENTRY
        .long   4, 4, 18
        .asciz  "Xen"
        .long   entry

        .section .text.entry, "ax"
        .code32
        .globl  entry
entry:  cli
        cld
        movl    $stack_top, %esp

        # The first 8 GiB, identity-mapped in 2 MiB pages that ring 3 may use.
        movl    $directories + 7, tables
        movl    $directories, %edi
        movl    $pages + 7, %eax
        movl    $8, %ecx
0:      movl    %eax, (%edi)
        addl    $8, %edi
        addl    $4096, %eax
        loop    0b
        movl    $pages, %edi
        movl    $0x87, %eax             # present, writable, user, large
        xorl    %edx, %edx              # the upper half of the address
        movl    $(8 * 512), %ecx
1:      movl    %eax, (%edi)
        movl    %edx, 4(%edi)
        addl    $8, %edi
        addl    $0x200000, %eax
        adcl    $0, %edx
        loop    1b

        movl    $tables, %eax
        movl    %eax, %cr3
        movl    %cr4, %eax
        orl     $0x20, %eax             # PAE
        movl    %eax, %cr4
        movl    $0xc0000080, %ecx       # EFER: long mode
        rdmsr
        orl     $0x100, %eax
        wrmsr
        movl    %cr0, %eax
        orl     $0x80000001, %eax       # paging, protection
        movl    %eax, %cr0
        lgdtl   gdt_register
        ljmpl   $8, $long_mode

        .code64
long_mode:
        movl    $16, %eax
        movl    %eax, %ds
        movl    %eax, %es
        movl    %eax, %ss
        movq    $stack_top, %rsp

        movq    $task + 4, %rax         # ring 0's stack when ring 3 calls
        movq    $stack_top, (%rax)
        movq    $task, %rax             # its descriptor
        movw    %ax, gdt_task + 2
        shrq    $16, %rax
        movb    %al, gdt_task + 4
        movb    %ah, gdt_task + 7
        movl    $40, %eax
        ltr     %ax

        movq    $idt, %rdi              # any fault is reported on the serial port and ends the guest
        movl    $32, %ecx
2:      movq    $fault, %rax
        call    gate
        loop    2b
        movq    $idt + 13 * 16, %rdi
        movq    $port, %rax
        call    gate
        lidtq   idt_register

        # kvmclock, where there is one: KVM writes the time into this page from now on.
        movl    $0x40000000, %eax
        cpuid
        cmpl    $0x4b4d564b, %ebx       # "KVMK"
        jne     3f
        movl    $0x4b564d01, %ecx       # MSR_KVM_SYSTEM_TIME_NEW
        movq    $clock, %rax
        orq     $1, %rax
        xorl    %edx, %edx
        wrmsr
3:
        pushq   $0x1b                   # ss, rsp, flags, cs, rip of ring 3
        pushq   $user_stack_top
        pushq   $2
        pushq   $0x23
        pushq   $guest_main
        iretq

# An entry of the IDT at rdi that leads to rax.
gate:   movw    %ax, (%rdi)
        movw    $8, 2(%rdi)
        movb    $0, 4(%rdi)
        movb    $0x8e, 5(%rdi)
        shrq    $16, %rax
        movw    %ax, 6(%rdi)
        shrq    $16, %rax
        movl    %eax, 8(%rdi)
        addq    $16, %rdi
        ret

# inb %dx, %al or outb %al, %dx in ring 3, each of one byte.
port:   testb   $3, 16(%rsp)            # cs, above the error code and rip
        jz      fault
        addq    $8, %rsp
        pushq   %rcx
        movq    8(%rsp), %rcx
        movb    (%rcx), %cl
        incq    8(%rsp)
        cmpb    $0xee, %cl
        je      4f
        cmpb    $0xec, %cl
        jne     fault
        popq    %rcx
        inb     %dx, %al
        iretq
4:      popq    %rcx
        outb    %al, %dx
        iretq

fault:  movw    $0x3f8, %dx
        movb    $0xfe, %al
        outb    %al, %dx
5:      cli
        hlt
        jmp     5b

        .data
        .balign 16
gdt:    .quad   0
        .quad   0x00af9b000000ffff      # 8: code of ring 0
        .quad   0x00cf93000000ffff      # 16: data of ring 0
        .quad   0x00cff3000000ffff      # 24: data of ring 3
        .quad   0x00affb000000ffff      # 32: code of ring 3
gdt_task:
        .quad   0x0000890000000067, 0   # 40
gdt_register:
        .word   gdt_register - gdt - 1
        .quad   gdt
idt_register:
        .word   256 * 16 - 1
        .quad   idt
        .balign 16
task:   .fill   104, 1, 0

        .bss
        .balign 4096
tables: .skip   4096
directories:
        .skip   4096
pages:  .skip   8 * 4096
idt:    .skip   4096
clock:  .skip   4096
        .skip   4096
stack_top:
        .skip   16384
user_stack_top:
