// Lists that stand once: of choices and of the members of a struct. What is compiled, what the bindings read and what
// Python is checked against at import are all made from them.
#pragma once

#include <cstdint>

// enum class Name : int32_t { one, two };  and name_of(Name{}), names_of(Name{})
#define SFR_ENUMERATOR(name) name,
#define SFR_ENUMERATOR_NAME(name) #name,
#define SFR_CHOICES(Name, LIST)                                           \
  enum class Name : int32_t { LIST(SFR_ENUMERATOR) };                     \
  inline const char* name_of(Name) {                                      \
    return #Name;                                                         \
  }                                                                       \
  template <class Visit>                                                  \
  void choices_of(Name, Visit&& visit) {                                  \
    for (const char* choice : {LIST(SFR_ENUMERATOR_NAME)}) visit(choice); \
  }

// Inside of struct Name: its members FIELD(type, name, default), and fields(visit), which calls visit(name, member) for
// each of them in order. A list of a derived struct also has BASE(type, name): the base with all its fields as one.
#define SFR_MEMBER(type, name, initial) type name = initial;
#define SFR_VISIT(type, name, initial) visit(#name, name);
#define SFR_FIELDS(Name, LIST) \
  LIST(SFR_MEMBER)             \
  static const char* title() { \
    return #Name;              \
  }                            \
  template <class Visit>       \
  void fields(Visit&& visit) { \
    LIST(SFR_VISIT)            \
  }
#define SFR_NO_MEMBER(type, name)
#define SFR_VISIT_BASE(type, name) visit(#name, static_cast<type&>(*this));
#define SFR_DERIVED_FIELDS(Name, LIST) \
  LIST(SFR_MEMBER, SFR_NO_MEMBER)      \
  static const char* title() {         \
    return #Name;                      \
  }                                    \
  template <class Visit>               \
  void fields(Visit&& visit) {         \
    LIST(SFR_VISIT, SFR_VISIT_BASE)    \
  }
