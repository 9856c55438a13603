// Types of all shapes, and what the compiler makes of them: the program prints
// where every member is, and some objects as they are in its memory. The tests
// compile it, and compare package ktype's answers with its output:
//
//	S type size
//	F path offset size
//	B path first-bit width                (of a bit-field)
//	M address bytes                       (memory)
//	A name address                        (of an object)
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef unsigned int u32;
typedef unsigned long long u64;
typedef _Bool flag;

enum color { RED, GREEN = 5, BLUE = 0x7fffffff };
enum level { LOW = -2, MID = 0, HIGH = 3 };
enum wide { NARROW = 1, WIDE = 0x123456789abcULL };

struct list_head { struct list_head *next, *prev; };
struct hlist_node { struct hlist_node *next, **pprev; };
struct hlist_head { struct hlist_node *first; };

struct declared;

struct inner {
	char c;
	short s;
	union {
		int i;
		float f;
		struct { unsigned char lo, hi; };
		struct { u32 x; u64 y; } named;
	};
	const volatile long tail;
};

struct bits {
	unsigned a : 1;
	unsigned b : 3;
	signed c : 5;
	unsigned : 4;
	unsigned d : 20;
	u64 e : 40;
	unsigned char f : 7;
	flag g : 1;
	int plain;
	unsigned long h : 64;
	enum color k : 31;
};

struct packed {
	char c;
	u64 wide;
	unsigned p : 3;
	u64 q : 60;
	short s;
} __attribute__((packed));

struct aligned {
	char c;
	int v __attribute__((aligned(64)));
} __attribute__((aligned(128)));

struct empty {};

struct flex {
	int n;
	struct inner items[];
};

union any {
	char bytes[24];
	u64 words[2];
	struct inner in;
	struct { int only; };
};

struct task {
	u64 state;
	struct {
		struct {
			int deep;
			union { struct { char deeper[3]; }; u32 alias; };
		};
	};
	struct bits bits;
	struct list_head node;
	struct hlist_node hnode;
	struct task *parent;
	const char *name;
	char comm[16];
	unsigned char mac[6];
	int grid[3][4];
	struct inner parts[5];
	struct inner *ptrs[2];
	int (*hook)(struct task *, const char *name, ...);
	void *opaque;
	struct declared *decl;
	enum color color;
	enum level level;
	enum wide wide;
	flag on;
	signed char tiny;
	unsigned char utiny;
	short small;
	long negative;
	unsigned long huge;
	double real;
	struct empty none;
	struct aligned al;
	union any u;
	u32 after;
	char last[];
};

#define S(T) printf("S " #T " %zu\n", sizeof(T))
#define F(P, T, m) printf("F " P "." #m " %zu %zu\n", offsetof(T, m), sizeof(((T *)0)->m))
#define B(P, T, m) do { \
		static T o; unsigned char *p = (void *)&o; int first = -1, n = 0; \
		o.m = -1; \
		for (size_t i = 0; i < sizeof(o) * 8; i++) \
			if (p[i / 8] >> (i % 8) & 1) { if (first < 0) first = i; n++; } \
		printf("B " P "." #m " %d %d\n", first, n); \
	} while (0)

static void memory(const void *p, size_t n)
{
	printf("M %#lx ", (unsigned long)p);
	for (size_t i = 0; i < n; i++)
		printf("%02x", ((const unsigned char *)p)[i]);
	printf("\n");
}

int func(struct task *t, const char *name, u32 flags, enum color c, flag on, long off, int (*cb)(void *));
int func(struct task *t, const char *name, u32 flags, enum color c, flag on, long off, int (*cb)(void *))
{
	return t && name && flags && c && on && off && cb;
}

void *nothing(void);
void *nothing(void) { return 0; }

int printer(const char *fmt, ...);
int printer(const char *fmt, ...) { return !fmt; }

struct task tasks[4];
struct list_head head;
struct hlist_head hhead;
struct flex *keep_flex;
struct bits keep_bits;
struct packed keep_packed;
enum wide keep_wide;

int main(void)
{
	S(struct inner); S(struct bits); S(struct packed); S(struct aligned); S(struct empty);
	S(struct flex); S(union any); S(struct task); S(enum color); S(enum wide); S(u64); S(flag);
	S(struct list_head); S(int); S(char);

	F("inner", struct inner, c); F("inner", struct inner, s); F("inner", struct inner, i);
	F("inner", struct inner, f); F("inner", struct inner, lo); F("inner", struct inner, hi);
	F("inner", struct inner, named); F("inner", struct inner, named.x); F("inner", struct inner, named.y);
	F("inner", struct inner, tail);
	F("struct bits", struct bits, plain);
	B("bits", struct bits, a); B("bits", struct bits, b); B("bits", struct bits, c);
	B("bits", struct bits, d); B("bits", struct bits, e); B("bits", struct bits, f);
	B("bits", struct bits, h); B("bits", struct bits, k);
	F("packed", struct packed, c); F("packed", struct packed, wide); F("packed", struct packed, s);
	B("packed", struct packed, p); B("packed", struct packed, q);
	F("aligned", struct aligned, c); F("aligned", struct aligned, v);
	F("flex", struct flex, n);
	printf("F flex.items[0] %zu %zu\n", offsetof(struct flex, items), sizeof(struct inner));
	printf("F flex.items[7].s %zu %zu\n", offsetof(struct flex, items[7].s), sizeof(short));
	F("any", union any, bytes); F("any", union any, words); F("any", union any, words[1]);
	F("any", union any, in.tail); F("union any", union any, only);
	F("task", struct task, state); F("task", struct task, deep); F("task", struct task, deeper);
	F("task", struct task, deeper[2]); F("task", struct task, alias); F("task", struct task, bits);
	F("task", struct task, bits.plain); F("task", struct task, node); F("task", struct task, node.prev);
	F("task", struct task, hnode.pprev); F("task", struct task, parent); F("task", struct task, name);
	F("task", struct task, comm); F("task", struct task, comm[15]); F("task", struct task, mac);
	F("task", struct task, grid); F("task", struct task, grid[2]); F("task", struct task, grid[2][3]);
	F("task", struct task, parts); F("task", struct task, parts[4].named.y);
	F("task", struct task, parts[1].hi); F("task", struct task, ptrs); F("task", struct task, ptrs[1]);
	F("task", struct task, hook); F("task", struct task, opaque); F("task", struct task, decl);
	F("task", struct task, color); F("task", struct task, level); F("task", struct task, wide);
	F("task", struct task, on); F("task", struct task, tiny); F("task", struct task, utiny);
	F("task", struct task, small); F("task", struct task, negative); F("task", struct task, huge);
	F("task", struct task, real); F("task", struct task, none); F("task", struct task, al);
	F("task", struct task, al.v); F("task", struct task, u); F("task", struct task, u.in.named.y);
	F("task", struct task, u.only); F("task", struct task, after);
	printf("F task.last[3] %zu 1\n", offsetof(struct task, last[3]));

	static const char name[192] = "a name of more than sixty-four bytes, so that it takes more than one read";
	head.next = head.prev = &head;
	struct hlist_node **link = &hhead.first;
	for (int i = 0; i < 4; i++) {
		struct task *t = &tasks[i];
		memset(t, 0xa5, sizeof(*t));
		t->state = 0x8000000000000001ULL + i;
		t->deep = -i;
		memcpy(t->deeper, "ab", 3);
		t->bits = (struct bits){ .a = 1, .b = 5, .c = -7, .d = 0xabcde, .e = 0x123456789aULL, .f = 99,
			.g = 1, .plain = -3, .h = ~0UL, .k = GREEN };
		t->node.prev = head.prev;
		t->node.next = &head;
		head.prev->next = &t->node;
		head.prev = &t->node;
		t->hnode.next = NULL;
		t->hnode.pprev = link;
		*link = &t->hnode;
		link = &t->hnode.next;
		t->parent = i ? &tasks[i - 1] : NULL;
		t->name = i ? name : NULL;
		memset(t->comm, 0, sizeof(t->comm));
		snprintf(t->comm, sizeof(t->comm), "task/%d", i);
		if (i == 3)
			memcpy(t->comm, "sixteen bytes!!!", 16);
		memcpy(t->mac, "\1\2\3\4\5\6", 6);
		for (int j = 0; j < 12; j++)
			t->grid[j / 4][j % 4] = j * 100 - 1;
		for (int j = 0; j < 5; j++)
			t->parts[j].s = -j;
		t->ptrs[0] = &t->parts[2];
		t->ptrs[1] = NULL;
		t->color = GREEN;
		t->level = LOW;
		t->wide = WIDE;
		t->on = 1;
		t->tiny = -1;
		t->utiny = 255;
		t->small = -32768;
		t->negative = -1234567890123L;
		t->huge = ~0UL;
	}
	memory(tasks, sizeof(tasks));
	memory(&head, sizeof(head));
	memory(&hhead, sizeof(hhead));
	memory(name, sizeof(name));
	printf("A tasks %#lx\nA head %#lx\nA hhead %#lx\n", (unsigned long)tasks, (unsigned long)&head, (unsigned long)&hhead);
	return keep_flex != 0 || func(0, 0, 0, 0, 0, 0, 0) || nothing() || printer("x");
}
