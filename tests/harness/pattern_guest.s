# A guest that never stops changing its memory, in a pattern that a snapshot can be checked by.
#
# A firmware image of 64 KiB that ends at 4 GiB: the processor starts in its last 16 bytes, so it
# needs no other firmware, no disk and no particular machine. It enters flat 32-bit protected
# mode and counts generations 1, 2, 3, ... In each it rewrites the pages FIRST_PAGE up to
# END_PAGE (exclusive), one after the other, words of a page in ascending order:
#
#   page p of generation g is all zero if (p + g) is a multiple of ZERO_EVERY; otherwise
#   word 0 = g, word 1 = p, word i = g * MUL_GENERATION + p * MUL_PAGE + i * MUL_WORD
#
# and then writes one byte, the low 7 bits of g, to the first serial port. At any instant, pages
# before some page k are of generation g, those after k of generation g - 1 (generation 0 is all
# zero), and only page k can be torn. guest.py says the same in Python and passes the constants.

        .code16
        .text
        .globl  start
start:  cli
        cld
        inb     $0x92, %al              # address line 20 on; bit 0 would reset
        orb     $2, %al
        andb    $0xfe, %al
        outb    %al, $0x92
        lgdtl   %cs:(gdt_register - start)
        movl    %cr0, %eax
        orl     $1, %eax
        movl    %eax, %cr0
        ljmpl   $8, $flat

        .code32
flat:   movw    $16, %ax
        movw    %ax, %ds
        movw    %ax, %es
        xorl    %ebx, %ebx              # the generation

next_generation:
        incl    %ebx
        movl    $FIRST_PAGE, %esi       # the page

next_page:
        movl    %esi, %edi
        shll    $12, %edi
        leal    (%esi,%ebx), %eax
        testl   $(ZERO_EVERY - 1), %eax
        jz      zero_page
        movl    %ebx, %eax
        stosl
        movl    %esi, %eax
        stosl
        imull   $MUL_GENERATION, %ebx, %eax
        imull   $MUL_PAGE, %esi, %edx
        leal    2 * MUL_WORD(%eax,%edx), %eax
        movl    $1022, %ecx
1:      stosl
        addl    $MUL_WORD, %eax
        decl    %ecx
        jnz     1b
        jmp     page_done

zero_page:
        xorl    %eax, %eax
        movl    $1024, %ecx
        rep stosl

page_done:
        incl    %esi
        cmpl    $END_PAGE, %esi
        jb      next_page

        movw    $0x3fd, %dx             # line status: wait until the port takes a byte
2:      inb     %dx, %al
        testb   $0x20, %al
        jz      2b
        movw    $0x3f8, %dx
        movl    %ebx, %eax
        andb    $0x7f, %al
        outb    %al, %dx
        jmp     next_generation

        .balign 8
gdt:    .quad   0
        .quad   0x00cf9b000000ffff      # code, 4 GiB, "accessed" already set: this is ROM
        .quad   0x00cf93000000ffff      # data, likewise
gdt_register:
        .word   gdt_register - gdt - 1
        .long   gdt

        .org    0xfff0
        .code16
        jmp     start
        .org    0x10000
