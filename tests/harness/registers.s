# A guest that enters 64-bit mode, puts known numbers into its registers, and stays there.
#
# A firmware image of 64 KiB that ends at 4 GiB, as guest.s. It maps the first 4 GiB onto themselves
# with pages of 1 GiB (the processor must know these: -cpu max), loads every register with a number
# that tells which one it is, writes 'R' to the first serial port, and jumps in a circle.
# test_devices.py knows the numbers from info registers, not from here.

        .code16
        .text
        .globl  start
start:  cli
        inb     $0x92, %al              # address line 20 on; bit 0 would reset
        orb     $2, %al
        andb    $0xfe, %al
        outb    %al, $0x92
        xorw    %ax, %ax
        movw    %ax, %ds
        movl    $0x2003, 0x1000         # the tables: one entry, then four pages
        movl    $0, 0x1004
        movw    $0x2000, %di
        movl    $0x83, %eax
1:      movl    %eax, (%di)
        movl    $0, 4(%di)
        addw    $8, %di
        addl    $0x40000000, %eax
        jnc     1b
        movl    $0x620, %eax            # PAE, SSE
        movl    %eax, %cr4
        movl    $0x1000, %eax
        movl    %eax, %cr3
        movl    $0xc0000080, %ecx       # EFER: LME, SCE
        movl    $0x101, %eax
        xorl    %edx, %edx
        wrmsr
        lgdtl   %cs:(gdt_register - start)
        movl    $0x80000011, %eax
        movl    %eax, %cr0
        ljmpl   $8, $long

        .code64
long:   movl    $16, %eax
        movl    %eax, %ds
        movl    %eax, %ss
        .macro  base msr, value         # of a segment: a model specific register
        movl    $\msr, %ecx
        movl    $\value, %eax
        movl    $0xffff8880, %edx
        wrmsr
        .endm
        base    0xc0000100, 0x0f500000  # FS
        base    0xc0000101, 0x06500000  # GS
        base    0xc0000102, 0x06600000  # GS of the kernel
        base    0xc0000082, 0x01500000  # LSTAR
        movabsq $0x1122334455667788, %rax
        movq    %rax, %xmm3
        movabsq $0x99aabbccddeeff00, %rax
        movq    %rax, %xmm4
        movlhps %xmm4, %xmm3
        movl    $'R', %eax
        movw    $0x3f8, %dx
        outb    %al, %dx
        .irp    name, rax, rbx, rcx, rdx, rsi, rdi, rbp, rsp
        movabsq $0x0123456789ab0000 + (. - long), %\name
        .endr
        .irp    name, r8, r9, r10, r11, r12, r13, r14, r15
        movabsq $-0x0fedcba987650000 + (. - long), %\name
        .endr
2:      jmp     2b

        .balign 8
gdt:    .quad   0
        .quad   0x00af9b000000ffff      # code, 64 bits, "accessed" already set: this is ROM
        .quad   0x00cf93000000ffff      # data, likewise
gdt_register:
        .word   gdt_register - gdt - 1
        .long   gdt

        .org    0xfff0
        .code16
        jmp     start
        .org    0x10000
